"""bnlight: which normalization should my network use, at my batch size, on my GPUs?"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnlight.doctor import diagnose as diagnose
    from bnlight.lightning.sync import NormSync as NormSync
    from bnlight.population import adapt_statistics as adapt_statistics
    from bnlight.population import correct_inference as correct_inference
    from bnlight.population import pool_statistics as pool_statistics
    from bnlight.population import precise_statistics as precise_statistics
    from bnlight.population import reduce_statistics as reduce_statistics
    from bnlight.run.load import load as load
    from bnlight.surgery import constrain_norm as constrain_norm
    from bnlight.surgery import fold_norm as fold_norm
    from bnlight.surgery import freeze_norm as freeze_norm
    from bnlight.surgery import norm_parameters as norm_parameters
    from bnlight.surgery import norm_penalty as norm_penalty
    from bnlight.surgery import register_norm as register_norm
    from bnlight.surgery import replace_norm as replace_norm
    from bnlight.surgery import sync_norm as sync_norm
    from bnlight.surgery import unfreeze_norm as unfreeze_norm
    from bnlight.surgery import unsync_norm as unsync_norm

_HOMES = {
    "NormSync": "lightning.sync",
    "constrain_norm": "surgery",
    "adapt_statistics": "population",
    "pool_statistics": "population",
    "reduce_statistics": "population",
    "correct_inference": "population",
    "freeze_norm": "surgery",
    "load": "run.load",
    "unfreeze_norm": "surgery",
    "diagnose": "doctor",
    "fold_norm": "surgery",
    "norm_parameters": "surgery",
    "norm_penalty": "surgery",
    "precise_statistics": "population",
    "register_norm": "surgery",
    "replace_norm": "surgery",
    "sync_norm": "surgery",
    "unsync_norm": "surgery",
}
__all__ = [
    "NormSync",
    "adapt_statistics",
    "constrain_norm",
    "correct_inference",
    "diagnose",
    "fold_norm",
    "freeze_norm",
    "load",
    "norm_parameters",
    "norm_penalty",
    "pool_statistics",
    "precise_statistics",
    "reduce_statistics",
    "register_norm",
    "replace_norm",
    "sync_norm",
    "unfreeze_norm",
    "unsync_norm",
]


def _announce_groups() -> None:
    """Let Hydra find the config groups: before it has looked for plugins by a folder, afterwards by registration."""
    sys.path.append(str(Path(__file__).parent / "plugins"))
    plugins: Any = sys.modules.get("hydra.core.plugins")
    if plugins is not None and plugins.Plugins in plugins.Singleton._instances:
        import_module(f"{__name__}.run.searchpath").register()


_announce_groups()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
