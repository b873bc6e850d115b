"""A comparison in W&B: a report and a workspace over its runs, and a run that holds the table, page and verdict.

It needs wandb-workspaces (`pip install 'bnlight[wandb]'`), and W&B's server only to save what it has built.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # pydantic's, of how wandb-workspaces is written
    try:
        import wandb_workspaces.reports.v2
        import wandb_workspaces.workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a W&B report needs wandb-workspaces ({error}): pip install 'bnlight[wandb]'", name=error.name
        ) from error
