# SPDX-License-Identifier: Apache-2.0
"""Which pages of a request's KV the prefix cache may hand to others."""

from collections.abc import Callable

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request


class PageSharing:
    """Keeps out of the prefix cache what nobody else may read.

    * A block that was just reported: asynchronous scheduling (and vLLM 0.33) caches up
      to the last reported token, whose KV is final one step later, or never if the
      request ends.
    * Output of requests with shorter blocks for the answer: the same tokens have other
      KV in long blocks. Nor do these requests read such pages when they come back from
      a preemption, with output that others may have as well.

    Args:
        manager: the scheduler's.
        first_open_position: request -> start of the first block without final KV.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        first_open_position: Callable[[Request], int],
    ) -> None:
        self.apart: set[str] = set()  # those requests
        cache_blocks = manager.cache_blocks

        def cache_final_blocks(request: Request, num_computed_tokens: int) -> None:
            final = first_open_position(request)
            cache_blocks(request, min(num_computed_tokens, final))

        manager.cache_blocks = cache_final_blocks
        coordinator = manager.coordinator
        cache_all_blocks = coordinator.cache_blocks

        def cache_shared_blocks(request: Request, num_computed_tokens: int) -> None:
            if request.request_id in self.apart:
                num_computed_tokens = min(
                    num_computed_tokens, request.num_prompt_tokens
                )
            cache_all_blocks(request, num_computed_tokens)

        coordinator.cache_blocks = cache_shared_blocks

    def preempt(self, request: Request) -> None:
        """A request comes back with output that it may have read otherwise."""
        if request.request_id in self.apart:
            request.skip_reading_prefix_cache = True
