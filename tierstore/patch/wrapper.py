"""A tensor without storage that shows part of a source."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch

from tierstore.patch.ops import Geometry
from tierstore.patch.source import Source, typed_part
from tierstore.spec import TensorSpec


class Wrapper(torch.Tensor):
    """Shape, dtype and device of a view of a `Source`; the bytes are the source's."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    view_class: ClassVar[type[Wrapper]]
    late: ClassVar[tuple[Any, ...]] = ()  # operators, beside casts, whose results wait until they are read
    _source: Source
    _whole: bool  # True if it is all of the source, with the source's own geometry

    @classmethod
    def wrap(cls, source: Source, device: torch.device, geometry: Geometry | None = None, *, requires_grad: bool = False) -> Self:
        """Make a wrapper on `device` that shows `geometry` of `source`, or all of it."""
        whole = geometry is None or (geometry.offset == 0 and geometry.spec == source.spec)
        spec, offset = (source.spec, 0) if geometry is None else (geometry.spec, geometry.offset)
        wrapper: Self = torch.Tensor._make_wrapper_subclass(
            cls, spec.shape, strides=spec.stride, storage_offset=offset, dtype=spec.dtype, device=device, requires_grad=requires_grad
        )
        torch._C._set_throw_on_mutable_data_ptr(wrapper)  # data_ptr() would be 0 in silence
        wrapper._source = source
        wrapper._whole = whole
        return wrapper

    def view_of_source(self, geometry: Geometry) -> Wrapper:
        """Return another view of the same source; like any view it is an inference tensor only if this one is."""
        if torch.is_inference_mode_enabled() and not self.is_inference():
            with torch.inference_mode(False), torch.no_grad():
                return self.view_class.wrap(self._source, self.device, geometry)
        return self.view_class.wrap(self._source, self.device, geometry)

    def geometry(self) -> Geometry:
        return Geometry(TensorSpec.of(self), int(self.storage_offset()))

    def show(self, base: torch.Tensor) -> torch.Tensor:
        """Return this tensor's part of `base`, the plain tensor of its source."""
        part = base if self._whole else typed_part(base, TensorSpec.of(self), int(self.storage_offset()))
        return part if part.device == self.device else part.to(self.device)  # a settled source may lie elsewhere
