"""``python -m rlsys.launch +recipe=grpo_qwen``: compose the configuration, check it, run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from rlsys.config.assets import asset
from rlsys.config.build import build
from rlsys.config.compose import explain, open_overrides, overridden_keys, register_schemas, to_plain
from rlsys.config.errors import JobFailed, UserError
from rlsys.config.ignored import refuse_ignored
from rlsys.config.schema import RunConfig
from rlsys.tracking.secrets import mask_text

FAILED, EXIT_BAD_INPUT, INTERRUPTED = 1, 2, 130


def show_error(error: UserError) -> None:
    """One short block on standard error; no traceback, which would say nothing to the one who mistyped a key."""
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), mask_text(str(error))), soft_wrap=True)


def submitted(config: RunConfig, overrides: Sequence[str], *, profile: bool) -> int:
    """The run as a job of a cluster; its exit code. What can be known to be wrong with it here is said here."""
    if profile:
        raise UserError(
            "a profile is made where its command runs", where="submit", fix="leave submit out, or log in to the cluster"
        )
    from rlsys.cluster.submission import submit
    from rlsys.controller.trial import try_out

    try_out(config)
    return submit(config, overrides)


def main(argv: Sequence[str] | None = None, *, profile: bool = False) -> int:
    """Runs the command line.

    Args:
        profile: as ``rlsys profile`` does.

    Returns:
        0: finished or stopped cleanly; 1: the run failed; 2: bad input; 130: interrupted by Ctrl-C.
    """
    status = 0

    @hydra.main(config_path=str(asset("configs")), config_name="config", version_base="1.3")
    def run(composed: DictConfig) -> None:
        nonlocal status
        try:
            config = build(to_plain(composed))
            overrides = list(HydraConfig.get().overrides.task)
            refuse_ignored(config, overridden_keys(overrides))
            if config.submit:
                status = submitted(config, overrides, profile=profile)
                return
            from rlsys.controller.run import run_job  # torch and Ray only once the configuration is known to be good

            status = run_job(config, overrides, profile=profile)
        except UserError as error:  # caught here, because Hydra prints a line of its own about whatever passes it
            show_error(error)
            status = EXIT_BAD_INPUT

    register_schemas()
    # A warning of torch about itself at import, which tells a user nothing about the run.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them and leaving
    arguments, sys.argv = sys.argv, [sys.argv[0], *open_overrides(sys.argv[1:] if argv is None else argv)]
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        show_error(explain(error))
        return EXIT_BAD_INPUT
    except UserError as error:  # of a sweep: its launcher is called by Hydra
        show_error(error)
        return EXIT_BAD_INPUT
    except JobFailed:  # the sweep's table has said which and why
        return FAILED
    except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the last checkpoint
        return INTERRUPTED
    finally:
        sys.argv = arguments
    return status


if __name__ == "__main__":
    sys.exit(main())
