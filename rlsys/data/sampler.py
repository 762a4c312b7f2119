from __future__ import annotations
import random
import torch
import numpy as np
from rlsys.batch import DataProto, jagged


def _batch(rows, uids, encoder):
    task = np.empty(len(rows), dtype=object)
    task[:] = [r.task for r in rows]
    return DataProto.from_dict(tensors={"prompt_ids": jagged.from_rows([torch.tensor(encoder.encode(r)) for r in rows])}, non_tensors={"uid": np.array(uids, dtype=object), "task": task})


class PromptStream:
    def __init__(self, rows, encoder, *, prompts_per_step, seed, shuffle):
        self.rows, self.e, self.n, self.seed = rows, encoder, prompts_per_step, seed
        self.pos, self.epoch = 0, 0

    def next_batch(self):
        order = list(range(len(self.rows)))
        random.Random(self.seed * 1000 + self.epoch).shuffle(order)
        idx = order[self.pos:self.pos + self.n]
        self.pos += self.n
        if self.pos + self.n > len(order):
            self.pos, self.epoch = 0, self.epoch + 1
        return _batch([self.rows[i] for i in idx], [f"{self.rows[i].row_id}@{self.epoch}" for i in idx], self.e)

    def state_dict(self):
        return {"pos": self.pos, "epoch": self.epoch}

    def load_state_dict(self, s):
        self.pos, self.epoch = s["pos"], s["epoch"]


def held_out_batch(rows, encoder, *, problems):
    rows = rows[:problems]
    return _batch(rows, [f"{r.row_id}@eval" for r in rows], encoder)
