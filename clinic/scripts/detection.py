"""A detector in the manner of torchvision's references: losses in a dictionary, summed; warm-up, then steps down."""

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

SIZE, CELLS = 32, 8


class Shapes(torch.utils.data.Dataset):
    """Images with up to three squares or rings at random places."""

    def __init__(self, n, seed):
        self.n, self.seed = n, seed

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(self.seed * 100000 + i)
        image = 0.1 * torch.randn(1, SIZE, SIZE, generator=g)
        boxes, labels = [], []
        for _ in range(int(torch.randint(1, 4, (1,), generator=g))):
            w = int(torch.randint(6, 11, (1,), generator=g))
            x, y = torch.randint(0, SIZE - w, (2,), generator=g).tolist()
            label = int(torch.randint(2, (1,), generator=g))
            image[0, y : y + w, x : x + w] = 1.0
            if label:
                image[0, y + 2 : y + w - 2, x + 2 : x + w - 2] = 0.0
            boxes.append([x, y, x + w, y + w])
            labels.append(label)
        return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


def collate_fn(batch):
    return tuple(zip(*batch, strict=True))


class Detector(nn.Module):
    """In training mode it returns its losses, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        layers = []
        for a, b in ((1, 16), (16, 32), (32, 32)):
            layers += [
                nn.Conv2d(a, b, 3, padding=1, stride=1 if a == 1 else 2),
                nn.BatchNorm2d(b),
                nn.ReLU(inplace=True),
            ]
        self.backbone = nn.Sequential(*layers)
        self.head = nn.Conv2d(32, 1 + 4 + 2, 1)
        nn.init.constant_(self.head.bias[:1], -math.log(30))  # focal loss's prior

    def forward(self, images, targets=None):
        out = self.head(self.backbone(torch.stack(list(images)))).permute(0, 2, 3, 1)
        objectness, boxes, classes = out[..., 0], out[..., 1:5], out[..., 5:]
        if targets is None:
            return objectness.sigmoid(), boxes, classes.argmax(-1)
        wanted = torch.zeros_like(objectness)
        losses_box, losses_class = [], []
        for i, target in enumerate(targets):
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                cx, cy = (box[:2] + box[2:]) / 2
                row, column = int(cy * CELLS / SIZE), int(cx * CELLS / SIZE)
                wanted[i, row, column] = 1.0
                losses_box.append(F.smooth_l1_loss(boxes[i, row, column], box / SIZE, beta=0.1))
                losses_class.append(F.cross_entropy(classes[i, row, column][None], label[None]))
        p = F.binary_cross_entropy_with_logits(objectness, wanted, reduction="none")
        focal = ((1 - torch.exp(-p)) ** 2 * p).sum() / wanted.sum()
        return {
            "loss_objectness": focal,
            "loss_box_reg": torch.stack(losses_box).mean(),
            "loss_classifier": torch.stack(losses_class).mean(),
        }


def reduce_dict(losses):
    with torch.no_grad():
        return {k: losses[k].detach() for k in sorted(losses)}


def train_one_epoch(model, optimizer, data_loader, epoch, print_freq, limit):
    model.train()
    lr_scheduler = None
    if epoch == 0:
        warmup_iters = min(20, len(data_loader) - 1)
        lr_scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 20, total_iters=warmup_iters)
    for i, (images, targets) in enumerate(data_loader):
        if i >= limit:
            break
        loss_dict = model(images, targets)
        losses = sum(loss for loss in loss_dict.values())
        loss_dict_reduced = reduce_dict(loss_dict)
        loss_value = sum(loss_dict_reduced.values()).item()
        if not math.isfinite(loss_value):
            print(f"Loss is {loss_value}, stopping training")
            sys.exit(1)
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
        if i % print_freq == 0:
            parts = "  ".join(f"{k}: {v.item():.4f}" for k, v in loss_dict_reduced.items())
            print(f"Epoch: [{epoch}] [{i}] lr: {optimizer.param_groups[0]['lr']:.6f}  loss: {loss_value:.4f}  {parts}")


@torch.inference_mode()
def evaluate(model, data_loader):
    model.eval()
    found = total = 0
    for images, targets in data_loader:
        objectness, _, labels = model(images)
        for i, target in enumerate(targets):
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                row, column = (int((box[k] + box[k + 2]) / 2 * CELLS / SIZE) for k in (1, 0))
                found += bool(objectness[i, row, column] > 0.3 and labels[i, row, column] == label)
                total += 1
    print(f"Recall: {found / total:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10**9, help="upper limit of steps in an epoch")
    parser.add_argument("--save")
    args = parser.parse_args()
    torch.manual_seed(0)
    train = torch.utils.data.DataLoader(Shapes(640, 1), batch_size=16, shuffle=True, collate_fn=collate_fn)
    test = torch.utils.data.DataLoader(Shapes(64, 2), batch_size=16, collate_fn=collate_fn)
    model = Detector()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4)
    lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[5, 7], gamma=0.1)
    for epoch in range(args.epochs):
        train_one_epoch(model, optimizer, train, epoch, 10, args.steps)
        lr_scheduler.step()
        evaluate(model, test)
    if args.save:
        torch.save([model.state_dict(), optimizer.state_dict(), lr_scheduler.state_dict()], args.save)
