"""The loop: one training step is the whole story. How sampling and training overlap is its source's business
(``rlsys/controller/sources.py``)."""

from __future__ import annotations

from rlsys.controller.job import Job


def train(job: Job) -> None:
    """prompts → rollout → reward → old and reference log-probs → advantage → objective → weights → rollout.

    Raises:
        StopRequested: between two stages; the job can then be checkpointed at its last whole step.
        DeadlineExceeded, ActorFailed, RewardBudgetExceeded: see the stages.
    """
    job.begin()
    job.sync_weights()
    job.evaluate_if_due()
    while job.state.step < job.config.steps:
        job.begin_step()
        experience = job.experience()  # rewards and reference start on a shard as soon as it is sampled
        job.load(experience)
        reference_kl = job.old_logprobs()
        advantages = job.advantages(experience, reference_kl)
        job.update(experience, advantages)
        job.sync_weights()
        job.evaluate_if_due()
        job.end_step()
        job.checkpoint_if_due()
