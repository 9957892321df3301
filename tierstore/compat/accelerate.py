"""accelerate's functions for models that do not fit, over `tiered`: `from tierstore.compat.accelerate import cpu_offload`.

Signatures are accelerate's, so that positional and keyword calls work. There is no `with`: the session is `model.tiered` and
lives as long as the model; `remove_hook_from_module(model)` ends it. A weight is not on the meta device when it is
offloaded: it looks like any tensor of the execution device, and works in any operation; `model.tiered.tier_of(name)` says
where it is. Arguments that tell accelerate what must not be split, or what is used outside of its own `forward`
(`no_split_module_classes`, `preload_module_classes`, `force_hooks`), have no effect: any use of a weight is seen here.
"""

from tierstore.compat.building import init_empty_weights, init_on_device
from tierstore.compat.dispatching import dispatch_model, load_checkpoint_and_dispatch
from tierstore.compat.hooks import remove_hook_from_module, remove_hook_from_submodules
from tierstore.compat.inferring import get_balanced_memory, infer_auto_device_map
from tierstore.compat.offloading import UserCpuOffloadHook, cpu_offload, cpu_offload_with_hook, disk_offload

__all__ = [
    "UserCpuOffloadHook",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "get_balanced_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
]
