# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_unmask`."""

from vllm_unmask.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
