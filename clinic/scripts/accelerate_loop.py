"""A classifier of sequences in the manner of Accelerate's nlp_example.py: accumulate, clip, schedule, gather."""

import argparse
import os

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_linear_schedule_with_warmup

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Classifier(nn.Module):
    def __init__(self, vocabulary=20, size=32):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, size)
        layer = nn.TransformerEncoderLayer(size, 4, 2 * size, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(size, 2)

    def forward(self, input_ids, labels):
        logits = self.classifier(self.encoder(self.embed(input_ids)).mean(1))
        return nn.functional.cross_entropy(logits, labels), logits


def get_dataloaders(batch_size):
    """Which of two symbols is the more frequent?"""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (1600, 24), generator=g)
    labels = ((ids < 8).sum(1) > (ids >= 12).sum(1)).long()
    train, test = TensorDataset(ids[:1280], labels[:1280]), TensorDataset(ids[1280:], labels[1280:])
    return DataLoader(train, shuffle=True, batch_size=batch_size, drop_last=True), DataLoader(test, batch_size=64)


def training_function(args):
    accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision, gradient_accumulation_steps=2)
    set_seed(42)
    train_dataloader, eval_dataloader = get_dataloaders(16)
    model = Classifier()
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=2e-3)
    lr_scheduler = get_linear_schedule_with_warmup(
        optimizer=optimizer, num_warmup_steps=10, num_training_steps=len(train_dataloader) * args.epochs // 2
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    for epoch in range(args.epochs):
        model.train()
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                loss, _ = model(*batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        model.eval()
        right = []
        for batch in eval_dataloader:
            with torch.no_grad():
                _, logits = model(*batch)
            predictions, references = accelerator.gather_for_metrics((logits.argmax(dim=-1), batch[1]))
            right.append(predictions == references)
        # Use accelerator.print to print only on the main process.
        accelerator.print(
            f"epoch {epoch}: loss {loss.item():.5f} accuracy {torch.cat(right).float().mean().item():.4f}"
        )
    if args.save:
        accelerator.save(accelerator.get_state_dict(model), args.save)
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Simple example of training script.")
    parser.add_argument("--mixed_precision", type=str, default="no", choices=["no", "bf16"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--save")
    training_function(parser.parse_args())
