"""A user's file, `mine.py`: a network, LightningModules and a data module of somebody who has not heard of bnlight."""

MINE = '''
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Plain(nn.Module):
    """A network that chooses its norms itself."""

    def __init__(self, num_classes, eps=1e-3):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, eps=eps), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(72, num_classes),
        )

    def forward(self, x):
        return self.layers(x)


def net(norm):
    return nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 1))


class Regression(pl.LightningModule):
    """Its own network, norm, optimizer and metrics."""

    def __init__(self, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = net(nn.BatchNorm1d)

    def forward(self, x):
        return self.net(x).squeeze(1)

    def training_step(self, batch, index):
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.log("train/mse", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val/mae", F.l1_loss(self(batch[0]), batch[1]))

    def test_step(self, batch, index):
        self.log("test/mae", F.l1_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Factories(Regression):
    """Takes a norm, an optimizer and a scheduler, and keeps them in its hyperparameters as people do."""

    def __init__(self, norm, optimizer, scheduler=None):
        pl.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.net = net(norm)
        self.optimizer, self.scheduler = optimizer, scheduler

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


class Odd(Regression):
    """Logs what its own rank sees; on the second rank, that is no number."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("train_loss", loss.detach() + (float("nan") if self.global_rank == 1 and index == 2 else 0))
        return loss


class Bare(pl.LightningModule):
    """No validation, no test, manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = net(nn.BatchNorm1d)

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.mse_loss(self.net(batch[0]).squeeze(1), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        self.log("train/mse", loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Series(pl.LightningDataModule):
    """Knows neither input_shape nor num_classes."""

    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(96, 4, generator=generator)
        self.parts = TensorDataset(x, x.sum(1)), TensorDataset(x[:32], x[:32].sum(1))

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts[1], 16)

    def test_dataloader(self):
        return DataLoader(self.parts[1], 16)
'''

SHORT = ["trainer=cpu", "trainer.max_epochs=2", "logger=csv", "progress=off"]
SERIES = [*SHORT, "data=custom", "data._target_=mine.Series"]
REGRESSION = [*SERIES, "module=custom", "module._target_=mine.Regression", "replace_norm=true"]
MAE = ["monitor.metric=val/mae", "monitor.mode=min"]
