"""Stand-in."""
from __future__ import annotations


def balanced_partitions(group_tokens, parts):
    out = [[] for _ in range(parts)]
    load = [0] * parts
    for i in sorted(range(len(group_tokens)), key=lambda i: -group_tokens[i]):
        j = load.index(min(load))
        out[j].append(i)
        load[j] += group_tokens[i]
    return [sorted(p) for p in out]


def micro_batches(lengths, token_budget):
    out, cur, longest = [], [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if cur and (len(cur) + 1) * max(longest, lengths[i]) > token_budget:
            out.append(cur)
            cur, longest = [], 0
        cur.append(i)
        longest = max(longest, lengths[i])
    return out + ([cur] if cur else [])
