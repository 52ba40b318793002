"""Access to the tensors, children, hooks and parametrizations of modules.

``nn.Module`` has these in private tables, which public methods read more slowly or cannot write. If a table is missing,
the feature that needs it raises an error.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from l0hooks._torch.autograd import is_recorded
from l0hooks._torch.names import lookup, refuse
from l0hooks._torch.tensors import is_meta, same_tensor

_Owner = TypeVar("_Owner")
# if this is missing, assume hooks: torch's own code, which is slower, runs them
_has_global_hook: Callable[[], bool] = lookup("nn.modules.module._has_any_global_hook", lambda: True)
_PUBLIC_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_norm_base: type[nn.Module] | None = lookup("nn.modules.batchnorm._NormBase", None)
NORMS: tuple[type[nn.Module], ...] = (
    _PUBLIC_NORMS if _norm_base is None else (_norm_base,)
)  # norms with running statistics


def _is_caching() -> bool:
    return bool(vars(parametrize).get("_cache_enabled", True))


def _table(module: nn.Module, name: str) -> Any:
    try:
        return attrgetter(name)(module)
    except AttributeError:
        refuse(f"nn.Module.{name}", "gates on the weights of a model")


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The table of the parameters that ``module`` itself owns."""
    try:
        return module._parameters
    except AttributeError:
        refuse("nn.Module._parameters", "gates on the weights of a model")


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The table of the buffers that ``module`` itself owns."""
    table: dict[str, Tensor | None] = _table(module, "_buffers")
    return table


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The table of the modules that ``module`` itself holds, one with two names twice."""
    table: dict[str, nn.Module | None] = _table(module, "_modules")
    return table


def reorder_parameters(module: nn.Module, order: Sequence[str]) -> None:
    """Put the parameters of ``module`` into this order, **in place**; others follow."""
    own = parameters_of(module)
    module._parameters = {name: own[name] for name in (*order, *own) if name in own}


def parametrization_lists(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrized tensors of ``module`` itself, by name."""
    children = _table(module, "_modules")
    lists = children["parametrizations"] if "parametrizations" in children else None  # noqa: SIM401  TorchScript's has no get
    if not isinstance(lists, nn.ModuleDict):
        return {}
    return {name: plist for name, plist in lists.items() if isinstance(plist, parametrize.ParametrizationList)}


def parametrized_tensors(
    modules: Iterable[tuple[str, nn.Module]],
) -> list[tuple[str, nn.Module, str, parametrize.ParametrizationList]]:
    """Name, module, tensor name and :func:`parametrization_lists` of all parametrized tensors of named modules."""
    return [
        (name, module, tensor_name, chain)
        for name, module in modules
        for tensor_name, chain in parametrization_lists(module).items()
    ]


def drop_parametrization(module: nn.Module, tensor_name: str) -> None:
    """Remove the parametrization of one tensor, **in place**; with the last one restore the module's plain class."""
    plain: type[nn.Module] = type(module).__bases__[0]
    del module.parametrizations[tensor_name]  # type: ignore[operator, union-attr]  # torch types it as Module
    if parametrization_lists(module):
        own_class(module, without=tensor_name)
    else:
        module.__class__ = plain
        del _table(module, "_modules")["parametrizations"]


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters that ``module`` itself owns, parametrized ones under their plain name."""
    own: list[tuple[str, Tensor]] = [(name, p) for name, p in parameters_of(module).items() if p is not None]
    for name, chain in parametrization_lists(module).items():
        if chain.is_tensor and isinstance(chain.original, Tensor):  # weight_norm has two originals
            own.append((name, chain.original))
    return own


def all_tensors(model: nn.Module) -> list[tuple[str, nn.Module, str, Tensor]]:
    """Name, module, tensor name and tensor for the :func:`tensors_of` every module; a shared module once."""
    return [
        (name, module, tensor_name, tensor)
        for name, module in model.named_modules()
        for tensor_name, tensor in tensors_of(module)
    ]


def own_class(module: nn.Module, *, without: str = "") -> None:
    """Give a parametrized module a class of its own; otherwise deepcopies share the class with the properties."""
    shared: type[nn.Module] = type(module)
    namespace = {k: v for k, v in vars(shared).items() if k not in (without, "__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, namespace)


def unhook(module: nn.Module, owner: type | tuple[type, ...]) -> None:
    """Remove the forward hooks of ``module`` (not of its children) that are methods of an ``owner``."""
    before, after = _table(module, "_forward_pre_hooks"), _table(module, "_forward_hooks")
    for table in (before, after):
        for key in [k for k, hook in table.items() if isinstance(_owner_of(hook), owner)]:
            del table[key]
    for flags, table in (
        ("_forward_hooks_always_called", after),
        ("_forward_hooks_with_kwargs", after),
        ("_forward_pre_hooks_with_kwargs", before),
    ):
        flagged = _table(module, flags)
        for key in flagged.keys() - table.keys():
            del flagged[key]


def hook_owners(module: nn.Module, kind: type[_Owner]) -> list[_Owner]:
    """The objects of class ``kind`` whose methods are forward hooks of ``module`` itself, each once."""
    tables = _table(module, "_forward_pre_hooks"), _table(module, "_forward_hooks")
    owners = [_owner_of(hook) for table in tables for hook in table.values()]
    return list({id(one): one for one in owners if isinstance(one, kind)}.values())


def _owner_of(hook: object) -> object:
    return hook.__self__ if isinstance(hook, types.MethodType) else None


def drop_load_hooks(module: nn.Module, *hooks: Callable[..., object]) -> None:
    """Remove the hooks around ``load_state_dict`` of ``module`` that are one of these functions."""
    before: dict[int, Any] = _table(module, "_load_state_dict_pre_hooks")
    for key in [k for k, wrapped in before.items() if wrapped.hook in hooks]:
        del before[key]
    after: dict[int, Any] = _table(module, "_load_state_dict_post_hooks")
    for key in [k for k, hook in after.items() if hook in hooks]:
        del after[key]


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs hooks of its own; true if torch's tables of hooks are missing."""
    try:
        forward = module._forward_hooks or module._forward_pre_hooks
        return bool(forward or module._backward_hooks or module._backward_pre_hooks)
    except AttributeError:
        return True


def read_directly(module: nn.Module, tensor_name: str) -> None:
    """Make the property of a parametrized tensor of ``module`` call its gates directly.

    torch's list of parametrizations takes 30 µs, and 200 µs after a product of large matrices has emptied the caches.
    It is still used for recorded graphs, torch's own cache, further parametrizations, and hooks on any of them.
    """
    cls = type(module)
    whole: property = vars(cls)[tensor_name]
    compute: Callable[[nn.Module], Tensor] = whole.fget  # type: ignore[assignment]

    def get(self: nn.Module) -> Tensor:
        if not (is_recorded() or _is_caching() or _has_global_hook()):
            chain: Any = self._modules["parametrizations"]._modules[tensor_name]  # type: ignore[union-attr]
            members, weight = chain._modules, chain._parameters.get("original")
            gating = members["0"]
            if len(members) == 1 and weight is not None and not (is_hooked(gating) or is_hooked(chain)):
                read: Tensor | None = gating.read(weight)
                if read is not None:
                    return read
        return compute(self)

    setattr(cls, tensor_name, property(get, whole.fset))


class Traversal:
    """The function that ``Module._apply`` is applying to a model; a module with two parents meets it twice."""

    def __init__(self) -> None:
        self._function: weakref.ref[Callable[[Tensor], Tensor]] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return Traversal, ()

    def again(self, function: Callable[[Tensor], Tensor]) -> bool:
        """Whether :meth:`note` was called with ``function``."""
        return self._function is not None and self._function() is function

    def note(self, function: Callable[[Tensor], Tensor]) -> None:
        """Remember ``function`` by a weak reference."""
        self._function = weakref.ref(function)

    def fills(self, function: Callable[[Tensor], Tensor], tensor: Tensor, start: float | None = None) -> bool:
        """Whether ``function`` finds ``tensor`` without data, or found it so earlier in the same traversal.

        ``start`` is the value that ``tensor`` was filled with then; if that has changed, this is a later traversal.
        """
        if is_meta(tensor):
            self.note(function)
            return True
        return self.again(function) and (start is None or bool((tensor.detach() == start).all()))


class Tie:
    """One weight under the parametrizations of several layers; torch separates it when it leaves the meta device.

    Parameters
    ----------
    chains : sequence of ParametrizationList
    """

    def __init__(self, chains: Sequence[parametrize.ParametrizationList]) -> None:
        self._chains = tuple(chains)
        self._first = self._chains[0]
        self._traversal = Traversal()
        self._is_one = len({id(chain.original) for chain in chains}) == 1  # else several parameters with one memory

    def meet(self, gating: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """Prepare to move the weight under ``gating``: if ``function`` has moved that of another layer, share it."""
        if self._traversal.again(function):
            self.rejoin(self._first)
        else:
            self._first = next(chain for chain in self._chains if chain[0] is gating)
            self._traversal.note(function)

    def rejoin(self, chain: parametrize.ParametrizationList) -> None:
        """Give all layers the parameter of ``chain`` or, if that has no data, the first one with data."""
        own = [one.original for one in self._chains if isinstance(one.original, nn.Parameter)]
        found = next((p for p in (chain.original, *own) if isinstance(p, nn.Parameter) and not is_meta(p)), own[0])
        for one in self._chains:
            if one.original is not found and (self._is_one or same_tensor(one.original) != same_tensor(found)):
                parameters_of(one)["original"] = found
