"""``python -m vdu_peft``, which ``accelerate launch -m vdu_peft`` needs."""

from vdu_peft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
