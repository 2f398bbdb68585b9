"""`Submission`: what `LanguageModel.submit` returns."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Generator

from ef_jax.errors import InputError
from ef_jax.generation import Generation
from ef_jax.serving.batch_engine import BatchEngine
from ef_jax.serving.request import Request


class Submission:
    """A prompt that is being continued in the background.

    `await submission` gives its `Generation`, and `async for piece in submission` its text as it comes; both may be
    done, by several tasks, in any event loop. A task that is cancelled while it waits cancels the submission.
    """

    def __init__(self, engine: BatchEngine, request: Request) -> None:
        self._engine, self._request = engine, request

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._request.ended

    def cancel(self) -> None:
        """End it; its finish reason is "cancelled", unless it has ended. What it held is free by the next step."""
        self._engine.cancel([self._request])

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for its `Generation`.

        Args:
          timeout: seconds to wait at most; the submission goes on after that. None: as long as it takes.

        Raises:
          TimeoutError: it has not ended by then.
          LinkError, or any error: what has ended it.
        """
        if not self._request.wait(timeout):
            raise TimeoutError(f"the submission has not ended within {timeout:g} s")
        return self._request.result()

    def __await__(self) -> Generator[object, None, Generation]:
        return self._ended().__await__()

    async def _ended(self) -> Generation:
        await self._until(lambda: self.done)
        return self.result()

    async def __aiter__(self) -> AsyncIterator[str]:
        output = self._request.output
        if not output.has_text:
            raise InputError("this checkpoint has no tokenizer and makes no text: await the submission for its tokens")

        def beyond(given: int) -> bool:
            return given < len(output.pieces) or self.done

        given = 0
        while given < len(output.pieces) or not self.done:
            await self._until(functools.partial(beyond, given))
            for piece in output.pieces[given:]:
                given += 1
                yield piece
        self.result()

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds`, which only this submission's progress can change."""
        loop = asyncio.get_running_loop()
        while not holds():
            news = loop.create_future()
            listener = functools.partial(_wake, loop, news)
            self._request.listen(listener)
            try:
                if not holds():
                    await news
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                self._request.unlisten(listener)


def _wake(loop: asyncio.AbstractEventLoop, news: "asyncio.Future[None]") -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
        loop.call_soon_threadsafe(_settle, news)


def _settle(news: "asyncio.Future[None]") -> None:
    if not news.done():
        news.set_result(None)
