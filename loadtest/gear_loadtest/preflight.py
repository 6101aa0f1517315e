"""Asked once, before the run: is the server there, which model it serves, how many words make the tokens wanted.

Knows nothing of the load to come.
"""

from http import HTTPStatus

import aiohttp
import orjson

from gear_loadtest.errors import ServerUnusable
from gear_loadtest.target import Target
from gear_loadtest.transport import error_message, printable
from gear_loadtest.workload import Vocabulary, sample_words

_TIMEOUT = aiohttp.ClientTimeout(total=10)
_NUM_SAMPLE_WORDS = 100


async def find_model(session: aiohttp.ClientSession, target: Target, wanted: str | None) -> str:
    """`wanted`, or the first model that the server lists. Raises `ServerUnusable`, in any case if nobody answers."""
    url = target.url("/v1/models")
    try:
        async with session.get(url, timeout=_TIMEOUT, allow_redirects=False) as response:
            if wanted is not None:
                return wanted  # some servers list no models
            if response.status != HTTPStatus.OK:
                raise ServerUnusable(_refusal(url, response.status, await error_message(response)))
            return _first_id(url, await response.read())
    except TimeoutError:
        raise ServerUnusable(f"{url} did not answer within {_TIMEOUT.total:g} s: is the server up and idle?") from None
    except (aiohttp.ClientError, OSError) as error:
        raise ServerUnusable(
            f"cannot reach {target.base_url} ({printable(str(error))}): start the server or correct the URL"
        ) from None


def _refusal(url: str, status: int, message: str) -> str:
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return f"{url} answered {status} ({message}): set GEAR_API_KEY or OPENAI_API_KEY in the environment"
    if status == HTTPStatus.NOT_FOUND:
        return f"{url} answered 404: give the server's base URL, such as http://127.0.0.1:8000, or name the --model"
    return f"{url} answered {status} ({message}): wait until the server is ready, or name the --model"


def _first_id(url: str, body: bytes) -> str:
    try:
        return str(orjson.loads(body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ServerUnusable(f"{url} lists no model: is it an OpenAI-compatible server? If so, name --model") from None


async def measure_vocabulary(session: aiohttp.ClientSession, target: Target, model: str) -> Vocabulary:
    """Measured if the server has vLLM's `/tokenize`, else one token a word."""
    fewer = await _count_tokens(session, target, model, _NUM_SAMPLE_WORDS)
    more = await _count_tokens(session, target, model, 2 * _NUM_SAMPLE_WORDS)
    if fewer is None or more is None or more <= fewer:
        return Vocabulary()
    tokens_per_word = (more - fewer) / _NUM_SAMPLE_WORDS
    return Vocabulary(tokens_per_word, num_special_tokens=fewer - tokens_per_word * _NUM_SAMPLE_WORDS)


async def _count_tokens(session: aiohttp.ClientSession, target: Target, model: str, num_words: int) -> int | None:
    body = orjson.dumps({"model": model, "prompt": sample_words(num_words)})
    try:
        async with session.post(
            target.url("/tokenize"),
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=_TIMEOUT,
            allow_redirects=False,
        ) as response:
            return int(orjson.loads(await response.read())["count"]) if response.status == HTTPStatus.OK else None
    except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError):  # OSError: also a timeout
        return None  # a server without it, or with another's protocol; usage will tell the true length
