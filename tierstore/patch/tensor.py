"""TieredTensor: a tensor without storage that finds its bytes in a store, operation by operation, below autograd.

[Note: below autograd]
Autograd, autocast and functorch see an ordinary tensor with a shape, a dtype and a device. What they save for backward is
the TieredTensor, so the graph holds no weights, and backward asks the store again. Only what runs below them, in
`__torch_dispatch__`, gets plain resident tensors, under a lease for exactly one operation.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any, ClassVar, NoReturn, Self, cast

import torch

from tierstore.errors import UnsupportedTensorError
from tierstore.patch.dispatch import dispatch
from tierstore.patch.saving import Image, asked_by_state_dict, reduced
from tierstore.patch.source import SettledSource
from tierstore.patch.swap import own_attributes, replace_content
from tierstore.patch.wrapper import Wrapper
from tierstore.shield import shielded


class TieredTensor(Wrapper):
    """A view of a `Source`. `plain()` copies its value out; ordinary operations just work.

    What needs an address of memory that stays (`data_ptr`, `share_memory_`, dlpack) raises.
    """

    stands_for: ClassVar[type[torch.Tensor]] = torch.nn.Parameter
    _copied = False  # a small buffer, of which each call of its module has a plain copy
    _kept: Any = None  # the plain tensor that stays for readers without a lease
    _tie: Any = None  # by which plain tensors know this one

    def __new__(cls, *_: Any, **__: Any) -> Self:
        raise UnsupportedTensorError(
            "a TieredTensor is only made by tiered(); turn off what replaces weights itself, such as "
            "pipe.enable_sequential_cpu_offload() or accelerate's cpu_offload, inside the `with`"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    # -- reading ------------------------------------------------------------------------------------------------

    def plain(self) -> torch.Tensor:
        """Return the value as a plain tensor that the caller owns, detached; views of one source share memory."""
        return self.show(self._source.snapshot())

    @property
    def resident(self) -> torch.Tensor:
        """The plain tensor that compiled graphs use in place of this one; leased until it is garbage."""
        source = self._source
        if source.settled is not None:
            return self.show(source.settled)
        entries = list(source.entries())
        source.host.worked_on(0)
        with shielded():  # compilers ask under a mode that would turn the bytes into fake ones
            source.host.lease(entries, "a compiled graph")
            alias = self.show(source.read()).detach()
        weakref.finalize(alias, source.host.release_later, entries, threading.get_ident()).atexit = False
        return alias

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["resident"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> TieredTensor:
        tensor = inner["resident"]
        return TieredTensor.wrap(SettledSource(tensor), tensor.device)

    def detach(self) -> TieredTensor:
        """Return a view without gradient; to `state_dict()`, one that can be saved like a plain tensor."""
        view = cast(TieredTensor, super().detach())
        if not asked_by_state_dict(1):
            return view
        with torch.inference_mode(False), torch.no_grad():
            return StateTensor.wrap(view._source, view.device, view.geometry())

    # -- what plain tensors do in C -----------------------------------------------------------------------------

    @property
    def data(self) -> torch.Tensor:
        return super().detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, TieredTensor):
            source, geometry = value._source, value.geometry()
        else:
            source, geometry = self._source.host.adopt(self._source.name, value), None
        replace_content(self, type(self).wrap(source, self.device, geometry, requires_grad=self.requires_grad))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        self._kept = None  # the plain tensor must have the same flag; the next reader makes another one
        super().requires_grad_(requires_grad)
        return self

    @property
    def requires_grad(self) -> bool:
        return super().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def numpy(self, *, force: bool = False) -> Any:
        """Return a copy as a numpy array; what is written to it does not come back."""
        if self.requires_grad and not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.plain().numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self.plain().tolist()

    def __format__(self, spec: str) -> str:
        scalar = self.dim() == 0 and not isinstance(self, torch.nn.Parameter)
        return format(self.item(), spec) if scalar else object.__format__(self, spec)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"TieredTensor({self._source.name!r}, {self.plain()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = self._plain_like(self.plain().clone())
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._source.settled is None and self.stands_for is torch.nn.Parameter:
            return reduced(self, as_parameter=isinstance(self, torch.nn.Parameter))
        return self._plain_like(self.plain()).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _plain_like(self, plain: torch.Tensor) -> torch.Tensor:
        """Return `plain` as what this tensor stands for: a Parameter with the same flag and attributes, or a tensor."""
        if isinstance(self, torch.nn.Parameter):
            plain = torch.Tensor._make_subclass(self.stands_for, plain, self.requires_grad)
        elif self.requires_grad:
            plain.requires_grad_()
        plain.__dict__.update(own_attributes(self))
        return plain

    def share_memory_(self) -> NoReturn:
        raise UnsupportedTensorError(
            f"{self._source.name!r} is tiered and cannot be put into shared memory; use .plain() or leave the `with` first"
        )

    def __dlpack__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedTensorError(f"{self._source.name!r} is tiered and has no memory to share through dlpack; use .plain()")


@functools.cache
def tiered_class(kind: type[torch.Tensor]) -> type[TieredTensor]:
    """Return the TieredTensor class for tensors of class `kind`; a subclass of Parameter stays an instance of itself."""
    if not issubclass(kind, torch.nn.Parameter) or kind is torch.nn.Parameter:
        return TieredTensor
    return type(f"Tiered{kind.__name__}", (TieredTensor, kind), {"stands_for": kind})


class StateTensor(TieredTensor):
    """What `state_dict()` hands out: a view of the value as it is when it is read, which takes no memory before.

    It has an address, of bytes that may be read and stay as they are as long as it lives and nobody changes the value;
    what is written there goes nowhere.
    """

    late = (torch.ops.aten.clone.default,)
    _image: Image | None = None

    def data_ptr(self) -> int:
        return self._of_source().address() + int(self.storage_offset()) * self.itemsize

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._of_source().storage

    def _of_source(self) -> Image:
        if self._image is None:
            self._image = Image.of(self._source)
        return self._image

    @property
    def __tensor_flatten__(self) -> Any:
        raise AttributeError("a tensor of a state dict is no input of a compiled graph")  # else savers would take it for one


TieredTensor.view_class = TieredTensor
StateTensor.view_class = StateTensor
