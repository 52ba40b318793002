"""All benchmarks, in the order in which they are listed and shown: importing one registers it."""

from benchmarks import (  # noqa: F401, I001
    gated_step,
    scaling,
    evaluation,
    memory,
    startup,
    model_size,
    coupled_step,
    pruned,
    gpu,
    scripts,
    latency,
)
