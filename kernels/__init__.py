# SPDX-License-Identifier: Apache-2.0
"""One operator a folder: reference, Triton and CPU implementations, no vLLM."""
