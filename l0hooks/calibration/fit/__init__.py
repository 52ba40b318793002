"""How households are chosen and weighted: stages, the solver that runs them, progress and checkpoints."""
