"""An autoencoder in the manner of Lightning's first example: a LightningModule and Trainer.fit; or by hand, a GAN."""

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


class LitGAN(L.LightningModule):
    """Two optimisers and manual optimisation, as Lightning's GAN example has it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.LeakyReLU(0.2), nn.Linear(32, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def adversarial_loss(self, y_hat, real):
        wanted = torch.full_like(y_hat, float(real))
        return nn.functional.binary_cross_entropy_with_logits(y_hat, wanted)

    def training_step(self, batch, batch_idx):
        imgs, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(imgs.shape[0], 16).type_as(imgs)
        self.toggle_optimizer(optimizer_g)
        g_loss = self.adversarial_loss(self.discriminator(torch.sigmoid(self.generator(z))), real=True)
        self.log("g_loss", g_loss)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)
        self.toggle_optimizer(optimizer_d)
        fake = torch.sigmoid(self.generator(z)).detach()
        d_loss = self.adversarial_loss(self.discriminator(imgs), real=True)
        d_loss = (d_loss + self.adversarial_loss(self.discriminator(fake), real=False)) / 2
        self.log("d_loss", d_loss)
        self.manual_backward(d_loss)
        self.clip_gradients(optimizer_d, gradient_clip_val=1.0)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)
        if batch_idx % 10 == 0:
            print(f"batch {batch_idx} g_loss {g_loss.item():.5f} d_loss {d_loss.item():.5f}")

    def configure_optimizers(self):
        both = (self.generator, self.discriminator)
        return [optim.Adam(part.parameters(), lr=1e-3, betas=(0.5, 0.999)) for part in both], []


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--manual", action="store_true", help="a GAN with manual optimisation")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--save")
    args = parser.parse_args()
    L.seed_everything(7, verbose=False)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train = utils.data.TensorDataset(x[:1400], y[:1400])
    held_out = utils.data.TensorDataset(x[1400:], y[1400:])
    model = LitGAN() if args.manual else LitAutoEncoder()
    automatic = {} if args.manual else {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=args.steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            precision=args.precision,
            **automatic,
            default_root_dir=folder,
        )
        loaders = [utils.data.DataLoader(train, batch_size=50, shuffle=True)]
        loaders += [] if args.manual else [utils.data.DataLoader(held_out, batch_size=100)]
        trainer.fit(model, *loaders)
    print({k: round(v.item(), 6) for k, v in trainer.callback_metrics.items()})
    if args.save:
        torch.save(model.state_dict(), args.save)


if __name__ == "__main__":
    main()
