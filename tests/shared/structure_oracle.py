"""The oracle for channel groups: a member that nothing reads is irrelevant, whatever its other numbers are."""

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

TOLERANCE = 1e-5  # of the output's scale


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def draw(groups, share=1 / 3):
    """About ``share`` of every group's members, at least one and never all: pairs of (group, members)."""
    chosen = []
    for group in groups:
        count = min(max(1, round(share * group.size)), group.size - 1)
        chosen.append((group, torch.randperm(group.size)[:count]))
    return chosen


@torch.no_grad()
def close(model, chosen):
    """Set the columns that read the chosen members to zero."""
    tensors = tensors_of(model)
    for group, members in chosen:
        for site in group.readers:
            tensors[site.names[0]].index_fill_(site.axis, positions(site, members), 0)


@torch.no_grad()
def overwrite(model, chosen):
    """Put noise into all positions of the chosen members except where they are read."""
    tensors = tensors_of(model)
    for group, members in chosen:
        for site in group.sites:
            if not site.reads:
                tensor, where = tensors[site.names[0]], positions(site, members)
                noise = torch.randn_like(tensor.index_select(site.axis, where))
                tensor.index_copy_(site.axis, where, noise.abs() + 0.1 if "running_var" in site.names[0] else noise)


def positions(site, members):
    return torch.from_numpy(site.indices)[members].reshape(-1)


@torch.no_grad()
def outputs(model, inputs):
    return [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def gap(first, second):
    """The largest difference, relative to the scale of the first outputs; infinite if one is not finite."""
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        a, b = a.double(), b.double()
        if not (a.isfinite().all() and b.isfinite().all()):
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1)))
    return worst


def leak(model, inputs, chosen):
    """The change of the outputs by noise in closed members; the model is restored."""
    state = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    close(model, chosen)
    expected = outputs(model, inputs)
    _restore(model, state)
    overwrite(model, chosen)
    close(model, chosen)  # a column of a reader may be a row of a writer
    got = outputs(model, inputs)
    _restore(model, state)
    return gap(expected, got)


def effect(model, inputs, chosen):
    """The change of the outputs by the same noise while the members are open; the model is restored."""
    state = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    expected = outputs(model, inputs)
    overwrite(model, chosen)
    got = outputs(model, inputs)
    _restore(model, state)
    return gap(expected, got)


def check_consistent(model, groups):
    """Sites exist and are complete, indices are within bounds, no position belongs to two members or two groups."""
    tensors, seen = tensors_of(model), {}
    for group in groups:
        check_vectors(tensors, group)
        assert group.size > 1
        assert group.sites
        for site in group.sites:
            assert all(tensors[name].shape == site.shape for name in site.names)
            assert site.indices.shape[0] == group.size
            assert site.indices.shape[1] >= 1
            assert 0 <= site.indices.min() <= site.indices.max() < site.shape[site.axis]
            taken = seen.setdefault((site.names, site.axis), set())
            positions_here = site.indices.reshape(-1).tolist()
            assert len(set(positions_here)) == len(positions_here)
            assert taken.isdisjoint(positions_here)
            taken.update(positions_here)


def check_vectors(tensors, group):
    """Biases, affine parameters and running statistics go with the rows of their module."""
    present = {name for site in group.sites for name in site.names}
    for site in group.sites:
        for name, tensor in tensors.items() if not site.reads else ():
            same = name.rpartition(".")[0] == site.module and tensor.shape == site.shape[site.axis : site.axis + 1]
            assert not same or name in present, f"{name} is missing beside {site.names}"


def attributes_of(model):
    """Everything the modules of a model hold, down to the objects in their attributes, to be compared with ==."""
    return {name: _held(vars(module), 6) for name, module in model.named_modules()}


def _held(value, depth):
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value) or depth < 0:
        return id(value)
    if isinstance(value, dict):
        return [(key, _held(one, depth - 1)) for key, one in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [_held(one, depth - 1) for one in value]
    own = getattr(value, "__dict__", None)
    return value if own is None else _held(own, depth - 1)


@torch.no_grad()
def _restore(model, state):
    for name, tensor in tensors_of(model).items():
        tensor.copy_(state[name])


@torch.no_grad()
def randomise(model):
    """Weights, norms and statistics of ordinary size that all differ, so that every mistake shows."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if name.endswith(("weight", "gamma")) else 0.0))
        else:
            fan_in = max(4, parameter.numel() // parameter.shape[0])
            parameter.normal_(std=fan_in**-0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model
