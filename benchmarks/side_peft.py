"""PEFT's side: PROMPT_TUNING around transformers' model, fed by transformers' own sampler and padding."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, T5ForConditionalGeneration
from transformers.trainer_pt_utils import LengthGroupedSampler
from worker import serve
from workload import LEARNING_RATE, PROMPT_LENGTH, WEIGHT_DECAY, Workload, systematic_sample

from softprompt_jax.cli.allocator import keep_freed_memory


def of_folder(folder: str, dtype: str, variant: str, threads: int) -> Peft:
    """Load a side; `variant`: eager or sdpa (transformers' attention), or compile (torch.compile, over sdpa).

    With `-kept` behind it the allocator keeps freed memory, as it does on our side.
    """
    variant, _, kept = variant.partition("-")
    if kept:
        keep_freed_memory()
    torch.set_num_threads(threads)
    workload = Workload.read(folder)
    backbone = (AutoModelForCausalLM if workload.causal else T5ForConditionalGeneration).from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager" if variant == "eager" else "sdpa"
    )
    return Peft(backbone, workload, compiled=variant == "compile")


class Peft:
    """A training step of a model, on whatever device it is."""

    def __init__(self, backbone: PreTrainedModel, workload: Workload, compiled: bool):
        self.workload, self.device = workload, backbone.device
        backbone.config.use_cache = False  # only generation needs it
        kind = "CAUSAL_LM" if workload.causal else "SEQ_2_SEQ_LM"
        config = PromptTuningConfig(task_type=kind, num_virtual_tokens=PROMPT_LENGTH, num_transformer_submodules=1)
        self.model = get_peft_model(backbone, config)
        embedding = self.model.prompt_encoder["default"].embedding.weight
        embedding.data.copy_(torch.from_numpy(self.workload.prompt(embedding.shape[1])))
        self.model.eval()  # no dropout; gradients are unaffected
        for name, weight in self.model.named_parameters():
            assert weight.requires_grad == ("prompt_encoder" in name), name
        self.optimizer = torch.optim.AdamW([embedding], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.forward = torch.compile(self.model, dynamic=True) if compiled else self.model

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Take one optimizer step and return the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = {name: rows.to(self.device) for name, rows in batch.items()}
        output = self.forward(**batch)
        output.loss.backward()
        self.optimizer.step()
        if output.loss.dtype == torch.float32:
            return float(output.loss)
        with torch.no_grad():  # in bfloat16 the loss itself is 0.03 coarse
            return float(
                torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), batch["labels"].flatten())
            )

    def warm_up(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Let caches fill (and torch.compile compile), and leave the state as it was."""
        kept = copy.deepcopy((self.model.prompt_encoder.state_dict(), self.optimizer.state_dict()))
        for batch in batches[:1]:
            self.step(batch)
        self.model.prompt_encoder.load_state_dict(kept[0])
        self.optimizer.load_state_dict(kept[1])

    def batches(self, case: str, count: int) -> tuple[list[dict[str, torch.Tensor]], float]:
        """Return `count` batches and the share of padding in a whole epoch."""
        if case == "fixed":
            return [self._pad(pairs) for pairs in self.workload.fixed(count)], 0.0
        pairs = self.workload.uneven
        if case == "check":
            return [self._pad(pairs[: self.workload.batch_size])], 0.0
        lengths, size = [len(text) for text, _ in pairs], self.workload.batch_size
        generator = torch.Generator().manual_seed(0)
        if case == "grouped":
            order = list(LengthGroupedSampler(size, lengths=lengths, generator=generator))
        else:
            assert case == "dynamic"
            order = torch.randperm(len(pairs), generator=generator).tolist()
        epoch = [[pairs[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
        real = sum(PROMPT_LENGTH + len(text) + len(target) for batch in epoch for text, target in batch)
        sizes = np.array(
            [len(b) * (PROMPT_LENGTH + max(len(x) for x, _ in b) + max(len(y) for _, y in b)) for b in epoch]
            if not self.workload.causal
            else [len(b) * (PROMPT_LENGTH + max(len(x) + len(y) for x, y in b)) for b in epoch]
        )
        return [self._pad(epoch[i]) for i in systematic_sample(sizes, count)], float(1 - real / sizes.sum())

    def _pad(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Pad to the longest of the batch, as transformers' collators do by default; the loss is that of targets."""
        inputs, labels = zip(*pairs, strict=True)
        if self.workload.causal:
            labels = [np.concatenate([np.full(len(text), -100), target]) for text, target in pairs]
            inputs = [np.concatenate(pair) for pair in pairs]
        ids = _stacked(inputs, -1)
        return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "labels": _stacked(labels, -100)}


def _stacked(rows, filler: int) -> torch.Tensor:
    out = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = ids
    return torch.from_numpy(out)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    serve(of_folder)
