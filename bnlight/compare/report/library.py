"""wandb-workspaces, imported in one place: without it the error says what to install."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # pydantic's, of how the library is written
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
        from wandb_workspaces.reports.v2.internal import ReportViewspec
        from wandb_workspaces.workspaces.internal import View
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a W&B report needs wandb-workspaces ({error}): pip install 'bnlight[wandb]'", name=error.name
        ) from error

__all__ = ["ReportViewspec", "View", "expr", "wr", "ws"]
