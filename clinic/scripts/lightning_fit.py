"""An autoencoder in the manner of Lightning's first example: a LightningModule and Trainer.fit."""

import argparse
import logging
import tempfile
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn, optim, utils

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class LitAutoEncoder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 64))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x_hat = self.decoder(self.encoder(x))
        loss = nn.functional.mse_loss(x_hat, x)
        self.log("train_loss", loss)
        if batch_idx % 10 == 0:
            print(f"batch {batch_idx} loss {loss.item():.5f}")
        return loss

    def validation_step(self, batch, batch_idx):
        x, _ = batch
        self.log("val_loss", nn.functional.mse_loss(self.decoder(self.encoder(x)), x))

    def configure_optimizers(self):
        optimizer = optim.Adam(self.parameters(), lr=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--save")
    args = parser.parse_args()
    L.seed_everything(7, verbose=False)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train = utils.data.TensorDataset(x[:1400], y[:1400])
    held_out = utils.data.TensorDataset(x[1400:], y[1400:])
    autoencoder = LitAutoEncoder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=args.steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            accumulate_grad_batches=2,
            default_root_dir=folder,
        )
        trainer.fit(
            autoencoder,
            utils.data.DataLoader(train, batch_size=50, shuffle=True),
            utils.data.DataLoader(held_out, batch_size=100),
        )
    print({k: round(v.item(), 6) for k, v in trainer.callback_metrics.items()})
    if args.save:
        torch.save(autoencoder.state_dict(), args.save)


if __name__ == "__main__":
    main()
