"""A comparison in W&B: a report and a workspace over its runs, and a run that holds the table, page and verdict.

It needs wandb-workspaces (`pip install 'bnlight[wandb]'`), and W&B's server only to save what it has built.
"""
