"""Fine-tuning in the manner of the transfer-learning tutorial: a frozen trunk, two rates, a schedule, a best model."""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.optim as optim
from sklearn.datasets import load_digits
from torch.optim import lr_scheduler

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--steps", type=int, default=10**9, help="upper limit of steps in an epoch")
parser.add_argument("--schedule", choices=("onecycle", "plateau", "cosine", "sequential"), default="onecycle")
parser.add_argument("--save")
args = parser.parse_args()
torch.manual_seed(0)

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
y = torch.tensor(digits.target)
sets = {
    "train": torch.utils.data.TensorDataset(x[:1400], y[:1400]),
    "val": torch.utils.data.TensorDataset(x[1400:], y[1400:]),
}
dataloaders = {k: torch.utils.data.DataLoader(d, batch_size=50, shuffle=True) for k, d in sets.items()}

backbone = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
)  # fmt: skip
for param in backbone[0].parameters():
    param.requires_grad = False
model_ft = nn.Sequential()
model_ft.add_module("backbone", backbone)
model_ft.add_module("fc", nn.Linear(128, 10))
criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
optimizer_ft = optim.SGD(
    [
        {"params": [p for p in backbone.parameters() if p.requires_grad], "lr": 0.02},
        {"params": model_ft.fc.parameters(), "weight_decay": 1e-4},
    ],
    lr=0.05,
    momentum=0.9,
    nesterov=True,
)
total = args.epochs * min(args.steps, len(dataloaders["train"]))
if args.schedule == "onecycle":
    scheduler = lr_scheduler.OneCycleLR(optimizer_ft, max_lr=[0.05, 0.1], total_steps=total)
elif args.schedule == "cosine":
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer_ft, T_0=max(total // 2, 1))
elif args.schedule == "sequential":
    warm = lr_scheduler.LinearLR(optimizer_ft, start_factor=0.1, total_iters=5)
    tail = lr_scheduler.LambdaLR(optimizer_ft, [lambda step: 0.99**step, lambda step: 0.98**step])
    scheduler = lr_scheduler.SequentialLR(optimizer_ft, [warm, tail], milestones=[5])
else:
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer_ft, patience=1)


def train_model(model, criterion, optimizer, scheduler, num_epochs):
    since = time.time()
    with tempfile.TemporaryDirectory() as tempdir:
        best_model_params_path = Path(tempdir) / "best_model_params.pt"
        torch.save(model.state_dict(), best_model_params_path)
        best_acc = 0.0
        for epoch in range(num_epochs):
            print(f"Epoch {epoch}/{num_epochs - 1}")
            print("-" * 10)
            # Each epoch has a training and validation phase
            for phase in ["train", "val"]:
                if phase == "train":
                    model.train()  # Set model to training mode
                else:
                    model.eval()  # Set model to evaluate mode
                running_loss = 0.0
                running_corrects = 0
                seen = 0
                for i, (inputs, labels) in enumerate(dataloaders[phase]):
                    if phase == "train" and i >= args.steps:
                        break
                    # zero the parameter gradients
                    optimizer.zero_grad()
                    # forward: track history if only in train
                    with torch.set_grad_enabled(phase == "train"):
                        outputs = model(inputs)
                        _, preds = torch.max(outputs, 1)
                        loss = criterion(outputs, labels)
                        # backward + optimize only if in training phase
                        if phase == "train":
                            loss.backward()
                            optimizer.step()
                            if args.schedule != "plateau":
                                scheduler.step()
                    running_loss += loss.item() * inputs.size(0)
                    running_corrects += torch.sum(preds == labels.data)
                    seen += inputs.size(0)
                if phase == "val" and args.schedule == "plateau":
                    scheduler.step(running_loss)
                epoch_acc = running_corrects.double() / seen
                print(f"{phase} Loss: {running_loss / seen:.4f} Acc: {epoch_acc:.4f}")
                # deep copy the model
                if phase == "val" and epoch_acc > best_acc:
                    best_acc = epoch_acc
                    torch.save(copy.deepcopy(model.state_dict()), best_model_params_path)
        print(f"time {time.time() - since:.0f}s")
        print(f"Best val Acc: {best_acc:4f}")
        # load best model weights
        model.load_state_dict(torch.load(best_model_params_path, weights_only=True))
    return model


model_ft = train_model(model_ft, criterion, optimizer_ft, scheduler, args.epochs)
if args.save:
    torch.save(model_ft.state_dict(), args.save)
