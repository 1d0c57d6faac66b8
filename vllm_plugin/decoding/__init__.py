# SPDX-License-Identifier: Apache-2.0
"""The decoding algorithms: pure functions on tensors, no vLLM import.

A strategy is a choice for each slot: ``scoring`` says which token and how sure,
``acceptance`` which masked positions are unmasked now, ``denoise`` composes them
and ``canvas`` holds what a block is between two forward passes.
"""
