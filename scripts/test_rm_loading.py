"""Can this reward model be loaded and trusted? Natively, on request through plain transformers, and with what answers.

    python scripts/test_rm_loading.py --model_path merge/merged_model/Naive-RM-saferlhf --device cpu

Exit code 1 if a check fails. This is the short form of `ups-rm rm check`, which also judges it on labelled data.
"""

from __future__ import annotations

import argparse
import sys

from ups_rm.exits import CHECK_FAILED, guarded, show_tracebacks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="merge/merged_model/Naive-RM-saferlhf", help="RM folder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="also load it through plain transformers, which runs the folder's own Python files",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    show_tracebacks(arguments.debug)

    from ups_rm.reward.doctor import BATTERY, check_rm
    from ups_rm.reward.doctor.table import print_report
    from ups_rm.reward.scorer import safe_score

    report = check_rm(arguments.model_path, device=arguments.device, plain=arguments.trust_remote_code)
    print_report(report)
    for conversation, logit in zip(BATTERY, report.logits, strict=False):
        question, reply = (conversation[i]["content"][:60] for i in (-2, -1))
        print(f"logit {logit:+.4f}  safe score {safe_score(logit):.4f}  {question!r} -> {reply!r}")
    return 0 if report.ok else CHECK_FAILED


if __name__ == "__main__":
    sys.exit(guarded(main))
