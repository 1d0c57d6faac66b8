# SPDX-License-Identifier: Apache-2.0
"""Grammar constraints on a canvas of masked positions: numpy and xgrammar, no vLLM."""
