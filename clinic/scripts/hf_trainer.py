"""A GPT-2 from scratch, of two small layers, trained by the Trainer of Hugging Face transformers."""

import argparse
import inspect
import shutil
import tempfile
import textwrap

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments, set_seed


class Blocks(Dataset):
    def __init__(self, text, size=32):
        chars = sorted(set(text))
        ids = torch.tensor([chars.index(c) for c in text])
        self.blocks = ids[: len(ids) // size * size].view(-1, size)
        self.vocabulary = len(chars)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, i):
        return {"input_ids": self.blocks[i], "labels": self.blocks[i]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--save")
    args = parser.parse_args()
    set_seed(42)
    data = Blocks(inspect.getsource(textwrap))
    config = GPT2Config(
        vocab_size=data.vocabulary, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    folder = tempfile.mkdtemp()
    training_args = TrainingArguments(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=25,
        eval_strategy="steps",
        eval_steps=75,
        save_strategy="no",
        report_to=[],
        bf16=args.bf16,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    train, held_out = torch.utils.data.random_split(data, [0.9, 0.1], torch.Generator().manual_seed(0))
    trainer = Trainer(model=model, args=training_args, train_dataset=train, eval_dataset=held_out)
    trainer.remove_callback(PrinterCallback)  # it prints how long everything took
    result = trainer.train()
    for row in trainer.state.log_history:
        print({k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k})
    print("training loss", result.training_loss)
    shutil.rmtree(folder)
    if args.save:
        torch.save(model.state_dict(), args.save)


if __name__ == "__main__":
    main()
