"""Keeps the checkpoint from which a run goes on as if it had not stopped."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.data import _set_sampler_epoch
from pytorch_lightning.trainer.states import TrainerFn

from bnlight.lightning.rank_state import (
    State,
    add_results,
    gathered,
    generators,
    load_rank_state,
    rank_state,
    set_generators,
)
from bnlight.lightning.stop import Stopped, StopRequest, seconds
from bnlight.lightning.workers import draw_anew, persistent, restart

log = logging.getLogger(__name__)
NOTHING, SAVE, STOP = 0, 1, 100  # what the ranks agree on; STOP + the signal's number


class LastCheckpoint(pl.Callback):
    """Writes `dirpath/last.ckpt` between two batches: before each epoch, at the end, on request and on signals.

    There, and nowhere else, everything that belongs to a batch or an epoch has happened: metrics are logged,
    schedulers have stepped, validation is over. A run that resumes from it (`trainer.fit(ckpt_path=...)`, with
    this callback) is, on the CPU bit by bit, the run that was never stopped: the same batches in the same order,
    the same random numbers on each rank, the same epoch means. A loader with `state_dict` goes on by itself;
    any other is started as it was at the epoch's beginning, and the batches already seen are passed over.

    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 during the training end it between two optimizer steps: all ranks
    agree on the batch, write the checkpoint and raise `Stopped`. A second SIGINT raises KeyboardInterrupt.

    Stock Lightning (2.6) writes its checkpoints inside hooks instead. Resumed in the middle of an epoch it forgets
    the epoch's means, generators of random numbers and, at the epoch's last batch, the validation.

    Args:
        dirpath: the folder of `last.ckpt`; None is `checkpoints` in the Trainer's `default_root_dir`.
        every: optimizer steps (an int), or time (such as `"10min"`), after which it is written inside an
            epoch too; None is never.

    Raises ValueError for another `every`.
    """

    def __init__(self, dirpath: str | None = None, every: int | str | None = None) -> None:
        self.dirpath = dirpath
        self.steps = every if isinstance(every, int) and every > 0 else None
        self.seconds = None if self.steps else seconds(every, "checkpoint_every")
        self.request = StopRequest()
        self.stopped: Stopped | None = None
        self._saved_step, self._saved_at = 0, 0.0
        self._epoch_begun: State | None = None  # the generators when the epoch's iterator was made
        self._loaded: State | None = None
        self._results: State = {}  # sums of the epoch that are still to be added
        self._saving = self._ended = False

    def path(self, trainer: pl.Trainer) -> Path:
        """The checkpoint's file."""
        return Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints") / "last.ckpt"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.request.notice()
        fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
        set_up, advance, set_up_validation = fit.setup_data, epoch.advance, epoch.val_loop.setup_data

        def note_and_set_up() -> None:
            if fit._combined_loader is None:  # the first epoch's iterator is made here
                self._note_epoch(trainer)
            before = fit._combined_loader
            set_up()
            if fit._combined_loader is not before:
                self._prepare_workers(trainer)

        def set_up_validation_and_prepare() -> None:
            set_up_validation()
            if (loaders := epoch.val_loop._combined_loader) is not None:
                for loader in persistent(loaders.flattened):
                    draw_anew(loader)

        def advance_after_us(fetcher: Any) -> None:
            self._between_batches(trainer, fetcher)
            advance(fetcher)

        fit.setup_data = note_and_set_up  # type: ignore[method-assign]
        epoch.advance = advance_after_us  # type: ignore[method-assign,assignment]
        epoch.val_loop.setup_data = set_up_validation_and_prepare  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.request.listen()  # after Lightning's own handlers
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if self._loaded is not None and self._loaded["ended"]:
            trainer.should_stop = True  # training had come to its end, perhaps before max_epochs

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self._note_epoch(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._results:
            self._results = add_results(trainer, self._results)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = True
        if trainer.global_step:
            self.save(trainer)
        if self.request.signum is not None:  # a signal in the last step: nothing is left to train
            self.stopped = self._stopped(trainer, self.request.signum)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.request.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.request.release()
        epoch = trainer.fit_loop.epoch_loop
        for loop in (trainer.fit_loop, epoch, epoch.val_loop):
            for name in ("setup_data", "advance"):
                vars(loop).pop(name, None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._saving:  # another callback saves inside a hook: nothing can go on from there exactly
            return
        mine = rank_state(trainer)
        mine["epoch_begun"] = self._epoch_begun
        mine["results"] = self._results | mine["results"]
        checkpoint["ranks"] = gathered(mine)
        checkpoint["ended"] = self._ended

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        ranks = checkpoint.get("ranks")
        if trainer.state.fn != TrainerFn.FITTING or ranks is None:
            return
        if len(ranks) != trainer.world_size:
            seen = f"{len(ranks)} ranks, this run has {trainer.world_size}"
            log.warning("the checkpoint is of %s: random numbers and the epoch's sums differ", seen)
            return
        self._loaded = {**ranks[trainer.global_rank], "ended": checkpoint["ended"]}

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint now; all ranks call it together."""
        self._saving = True
        try:
            trainer.save_checkpoint(self.path(trainer))
        finally:
            self._saving = False
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _note_epoch(self, trainer: pl.Trainer) -> None:
        self._epoch_begun = generators(trainer.strategy.root_device)

    def _prepare_workers(self, trainer: pl.Trainer) -> None:
        """Lightning has started the first epoch's workers already; those of later epochs are to be like new ones."""
        loader = trainer.fit_loop._combined_loader
        workers = persistent(loader.flattened) if loader is not None else []
        if workers and self._epoch_begun is not None:
            for one in workers:
                restart(one)
                draw_anew(one)
            set_generators(self._epoch_begun, trainer.strategy.root_device)
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def _between_batches(self, trainer: pl.Trainer, fetcher: Any) -> None:
        if self._loaded is not None:
            self._go_on(trainer, fetcher, self._loaded)
            self._loaded = None
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done % trainer.accumulate_grad_batches:
            return  # a checkpoint holds no gradients
        wanted = self._agreed(trainer, self._wish(trainer, first=done == 0))
        if wanted == NOTHING:
            return
        if trainer.global_step and trainer.global_step != self._saved_step:
            self.save(trainer)
        if wanted >= STOP:
            self.stopped = self._stopped(trainer, wanted - STOP)
            raise self.stopped

    def _wish(self, trainer: pl.Trainer, first: bool) -> int:
        if self.request.signum is not None:
            return STOP + self.request.signum
        due = self.steps is not None and trainer.global_step - self._saved_step >= self.steps
        late = (
            self.seconds is not None
            and trainer.is_global_zero
            and time.monotonic() - self._saved_at >= self.seconds
        )
        return SAVE if first or due or late else NOTHING

    def _agreed(self, trainer: pl.Trainer, wish: int) -> int:
        """The largest wish of all ranks, so that all do the same at the same batch."""
        if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return wish
        wishes = torch.tensor([wish], device=trainer.strategy.root_device)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        return int(wishes.item())

    def _go_on(self, trainer: pl.Trainer, fetcher: Any, state: State) -> None:
        """Put everything back to the moment of the checkpoint, which was also between two batches."""
        fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
        device = trainer.strategy.root_device
        loader = fit._combined_loader
        assert loader is not None
        seen = epoch.batch_progress.current.ready
        if states := fit._combined_loader_states_to_load:
            # The loader was made before they were read, as by `trainer.estimated_stepping_batches`.
            loader._load_state_dicts(states)
            fit._combined_loader_states_to_load = []
            for one in loader.flattened:
                _set_sampler_epoch(one, trainer.current_epoch)
            iter(fetcher)
            fetcher.fetched += seen
        if not all(hasattr(one, "load_state_dict") for one in loader.flattened):
            for one in persistent(loader.flattened):
                restart(one)
            set_generators(state["epoch_begun"], device)
            iter(fetcher)
            for _ in range(seen):
                next(fetcher)
        # Lightning takes the first step after a resume for one that may have to be done again.
        epoch.restarting = False
        fit._restarting = False
        load_rank_state(trainer, state)
        set_generators(state["generators"], device)
        self._epoch_begun, self._results = state["epoch_begun"], state["results"]

    def _stopped(self, trainer: pl.Trainer, signum: int) -> Stopped:
        where = f"epoch {trainer.current_epoch + (not self._ended)}, step {trainer.global_step}"
        return Stopped(signum, where, self.request.previous(signum))
