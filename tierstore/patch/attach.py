"""Puts a model's tensors under a store, and takes them out again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch.utils.hooks import RemovableHandle

from tierstore.entry import Entry
from tierstore.errors import BudgetError, TierStoreError
from tierstore.patch.handout import ResidentParameter
from tierstore.patch.host import StoreHost
from tierstore.patch.prestored import find_stored, load_and_hold, note_writes
from tierstore.patch.regions import Binding, Region, StoredValue, check_model, find_regions, named_tensors
from tierstore.patch.restore import give_back_held, move_plain, restore_binding, settle
from tierstore.patch.room import check_room, largest_owner, smallest
from tierstore.patch.scope import install_scope, remove_scope
from tierstore.patch.shares import Share
from tierstore.patch.source import SettledSource, typed_part
from tierstore.patch.stored import EntrySource, StoredSource
from tierstore.patch.swap import replace_content
from tierstore.patch.tensor import tiered_class
from tierstore.patch.watch import watch
from tierstore.patch.wrapper import Wrapper
from tierstore.planning.policy import Foresight
from tierstore.spec import raw_bytes, typed_view
from tierstore.store import TieredStore

SMALL = 64 << 10  # bytes; tensors up to this size are held where many of them take a small part of the fast tier
SHARE_OF_SMALL = 16  # the part is one of so many

_FAILURES = (TierStoreError, OSError, RuntimeError, MemoryError)  # of bringing one weight back; the others come back all the same

Progress = Callable[[Iterable[Region]], Iterable[Region]]


class Attachment(StoreHost):
    """The tie between models and one store, from `attach` to `detach`.

    Where everything fits into the fast tier the tensors stay plain and are only counted ("held"): no wrapper, no scope, no
    cost. Where it does not, the small ones are held, as long as they take a small part of that tier together.
    """

    def __init__(self, store: TieredStore, device: torch.device) -> None:
        super().__init__(store, device)
        self.roots: dict[str, torch.nn.Module] = {}
        self._regions: list[Region] = []
        self._held: dict[Region, Entry] = {}
        self.holds_all = True
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._bound: set[int] = set()
        self._handles: list[RemovableHandle] = []

    # -- in -----------------------------------------------------------------------------------------------------

    def attach(
        self,
        roots: Mapping[str, torch.nn.Module],
        progress: Progress = iter,
        stored: Mapping[int, StoredValue] | None = None,
        share: Share | None = None,
    ) -> None:
        """Move every tensor of `roots`, or their `share`, under the store; on failure the models are as they were.

        `stored` says where the store has values already, by the ids of the tensors.
        """
        if share is None:
            share = Share(find_regions(named_tensors(roots)), [module for root in roots.values() for module in root.modules()])
        find_stored(share.regions, stored or {})
        check_room(self.moves.tiers, share.regions)
        self.roots = dict(roots)
        try:
            self._take(share.regions, share.modules, progress)
        except BaseException:
            self.detach()
            raise
        self._foretell()
        self._handles = watch(self)
        self.pressure.begin()

    def _take(self, regions: list[Region], modules: Iterable[torch.nn.Module], progress: Progress) -> None:
        budget = self.moves.tiers[0].ledger.limit
        self.total = sum(region.spec.nbytes for region in (*self._regions, *regions))
        if self.holds_all and budget is not None and self.total > budget:
            self.holds_all = False
            self.release_held()
        self.headroom = max(self.headroom, largest_owner((*self._held, *regions)))
        self._regions += regions
        self._bound.update(id(binding.tensor) for region in regions for binding in region.bindings)
        stay = self._staying(regions)
        loaded = load_and_hold(self.moves, stay)
        self._held.update(loaded)
        for region in progress([*stay, *(region for region in regions if region not in stay)]):
            if region in loaded:
                continue
            if region not in stay or region.stored is not None or not self._hold(region):
                self._tier(region)
        for module in modules:
            self._modules.add(module)
            self._enter(module)

    def _enter(self, module: torch.nn.Module) -> None:
        """Give a module of ours its scope, if it needs one."""
        if not self.holds_all:
            install_scope(module, self)

    def _foretell(self) -> None:
        """Tell the policy in which order the tensors will probably be used first: that of the modules that own them.

        Small ones are left out: norms are often registered after what they are used before.
        """
        policy = self.moves.tiers[0].policy
        if isinstance(policy, Foresight):
            with self.moves.lock:
                sizes = {key: self.moves.entries[key].nbytes for root in self.roots.values() for key in self.keys_of(root)}
                policy.foretell({key: nbytes for key, nbytes in sizes.items() if nbytes > SMALL})

    def _staying(self, regions: list[Region]) -> dict[Region, None]:
        """Return those of `regions` that are held, smallest first."""
        budget = self.moves.tiers[0].ledger.limit
        if self.holds_all or budget is None:
            return dict.fromkeys(regions)
        room = min(budget // SHARE_OF_SMALL, budget - 2 * self.headroom) - sum(entry.nbytes for entry in self._held.values())
        return dict.fromkeys(smallest(regions, room, SMALL))

    def _tier(self, region: Region) -> None:
        """Copy a region into the store, unless it is there, and put TieredTensors in the place of its tensors."""
        if region.stored is not None:
            source = self.stand_for(region.name, region.stored)
        else:
            assert region.base is not None
            source = self.adopt(region.name, region.base)
            region.base = None
        self._wrap_all(region, source)

    def _wrap_all(self, region: Region, source: StoredSource) -> None:
        for binding in region.bindings:
            self._wrap(binding, source)
        if region.lone_buffer and region.spec.nbytes <= SMALL:
            region.bindings[0].tensor._copied = True  # type: ignore[attr-defined]

    def _wrap(self, binding: Binding, source: StoredSource) -> None:
        tensor = binding.tensor
        wrapper = tiered_class(binding.kind).wrap(source, self.device, binding.geometry, requires_grad=tensor.requires_grad)
        replace_content(tensor, wrapper)

    def _hold(self, region: Region) -> bool:
        """Keep a region plain and resident for good, on the compute device, counted in the fast tier; False if there is no room.

        Where others stream past it is copied into memory of the tier: the model's own may be a map of a file, whose pages
        the system would drop and read again, with others around them, in every pass.
        """
        assert region.base is not None
        base = region.base
        tier = self.moves.tiers[0]
        with self.moves.lock:
            if not self.moves.make_room(0, region.spec.nbytes):
                return False
        with torch.inference_mode(False), torch.no_grad():
            if base.device != self.device or not self.holds_all:
                base = typed_view(raw_bytes(base).to(self.device, copy=True), region.spec)
                for binding in region.bindings:
                    move_plain(binding.tensor, typed_part(base, binding.geometry.spec, binding.geometry.offset))
        with self.moves.lock:
            entry = Entry(self._free_key(region.name), region.spec)
            tier.backend.adopt(entry.key, base)  # type: ignore[attr-defined]
            self.moves.entries[entry.key] = entry
            self.moves.added(entry, 0)
            self.moves.hold(entry)
        region.base = None
        self._held[region] = entry
        return True

    def release_held(self, module: torch.nn.Module | None = None) -> None:
        """Turn held regions into tiered ones, all or those of `module`: they must be able to leave."""
        named = None if module is None else {id(tensor) for _, tensor in named_tensors({"": module})}
        for region, entry in list(self._held.items()):
            if named is not None and named.isdisjoint(id(binding.tensor) for binding in region.bindings):
                continue
            self.holds_all = False
            del self._held[region]
            note_writes(self.moves, entry)
            source = EntrySource(self, entry)
            self._sources.add(source)
            self._wrap_all(region, source)
            with self.moves.lock:
                self.moves.unhold(entry)
        if not self.holds_all:
            for module in self._modules:
                install_scope(module, self)

    def give_way(self) -> bool:
        held = bool(self._held)
        self.release_held()
        return held

    def has(self, module: torch.nn.Module) -> bool:
        return module in self._modules

    # -- while attached -----------------------------------------------------------------------------------------

    def module_added(self, parent: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        """A module was put into one of ours: take its tensors too."""
        if module is None or parent not in self._modules or all(part in self._modules for part in module.modules()):
            return
        new = {
            path: tensor
            for path, tensor in named_tensors({name: module})
            if id(tensor) not in self._bound and not isinstance(tensor, Wrapper) and not tensor.is_meta
        }  # of what is on meta, as adapters are at first, each parameter is seen again when it is loaded
        if not self._ours(module):
            check_model({name: module}, [id(tensor) for _, tensor in named_tensors({name: module}) if tensor.is_meta])
        self._take(find_regions(new.items()), module.modules(), iter)

    def _ours(self, module: torch.nn.Module) -> bool:
        return any(isinstance(tensor, Wrapper) for _, tensor in named_tensors({"": module}))

    def parameter_added(self, module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        """A parameter was set on one of our modules: take it too; the TieredTensor itself where its plain stand-in was set."""
        tied = parameter.tiered if isinstance(parameter, ResidentParameter) else None
        if tied is not None:
            return cast(torch.nn.Parameter, tied)
        if parameter is not None and module in self._modules and id(parameter) not in self._bound:
            self._take_parameter(module, name, parameter)
        return None

    def _take_parameter(self, module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        if isinstance(parameter, Wrapper):
            if self._mine(parameter):
                self._bind(parameter, name)
        elif parameter.device.type != "meta" and not torch.nn.parameter.is_lazy(parameter):
            self._take(find_regions([(name, parameter)]), [module], iter)

    def _bind(self, wrapper: Wrapper, name: str) -> None:
        """Remember a TieredTensor that users made from one of ours, so that it is restored as well."""
        kind = torch.nn.Parameter if isinstance(wrapper, torch.nn.Parameter) else torch.Tensor
        self._bound.add(id(wrapper))
        binding = Binding(wrapper, [name], wrapper.geometry(), self.device, kind)
        self._regions.append(Region([binding], wrapper._source.spec, None))

    def _mine(self, wrapper: Wrapper) -> bool:
        """True for what stands for values of this store, not of another session or another device."""
        return isinstance(wrapper._source, SettledSource) or wrapper._source.host is self

    def tier_map(self) -> dict[str, str]:
        """Return for each tensor name the fastest tier that holds its value."""
        regions = {id(binding.tensor): region for region in self._regions for binding in region.bindings}
        named = [(name, tensor) for name, tensor in named_tensors(self.roots) if id(tensor) in regions]
        return {name: self._place(regions[id(tensor)], tensor) for name, tensor in named}

    def _place(self, region: Region, tensor: torch.Tensor) -> str:
        if region in self._held or not isinstance(tensor, Wrapper):
            return self.moves.tiers[0].name
        with self.moves.lock:
            level = max((min(entry.tiers) for entry in tensor._source.entries()), default=0)  # of a divided one the slowest piece
            return self.moves.tiers[level].name

    def keys_of(self, module: torch.nn.Module) -> list[str]:
        """Return the keys of everything that `module` owns, itself or through submodules."""
        ours = (t for _, t in named_tensors({"": module}) if isinstance(t, Wrapper) and self._mine(t))
        entries = [entry for tensor in ours for entry in tensor._source.entries()]
        return list(dict.fromkeys(entry.key for entry in entries))

    # -- out ----------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Make the models plain again: same objects, devices and ties, values as last written. The store can close then.

        Whatever cannot be brought back stays a TieredTensor that works as long as the store is open, and an error says so;
        calling again tries the rest.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sweep()
        for name, tensor in named_tensors(self.roots):  # what appeared without passing a hook
            if isinstance(tensor, Wrapper) and id(tensor) not in self._bound and self._mine(tensor):
                self._bind(tensor, name)
        bindings = [binding for region in self._regions if region not in self._held for binding in region.bindings]
        self.moves.engine.gather()
        errors = self._settle_sources(bindings)
        for region, entry in self._held.items():
            give_back_held(region, entry)
            with self.moves.lock:
                self.moves.unhold(entry)
        self._held = {}
        left = {id(binding) for binding in bindings if not restore_binding(binding)}
        self._regions = [region for region in self._regions if any(id(binding) in left for binding in region.bindings)]
        for module in self._modules:
            remove_scope(module)
        if errors:
            raise TierStoreError(
                f"{len(errors)} weights could not be brought back ({errors[0]}); they stay tiered and keep working, all others are plain; "
                "make room, then call close() again"
            ) from errors[0]
        self._modules.clear()

    @staticmethod
    def _give_copies_bytes(source: StoredSource) -> None:
        """Make the copies still to be made: they would find no store."""
        try:
            source.before_write()
        except BudgetError:
            source.settle_copies()

    def _settle_sources(self, bindings: list[Binding]) -> list[Exception]:
        errors: list[Exception] = []
        homes = {id(source): b.device for b in bindings if isinstance(b.tensor, Wrapper) for source in b.tensor._source.chain()}
        ready: list[StoredSource] = []
        for source in list(self._sources):  # all of them first: what is settled makes no room for copies any more
            try:
                self._give_copies_bytes(source)
                ready.append(source)
            except _FAILURES as error:
                errors.append(error)
        for source in ready:
            try:
                settle(source, homes.get(id(source)))
            except _FAILURES as error:
                errors.append(error)
        for source in list(self._sources):  # those that the lazy copies turned into
            if source.settled is None and not errors:
                settle(source, homes.get(id(source)))
        return errors
