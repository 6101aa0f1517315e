"""Strings and HTTP around the engine: the OpenAI API, SSE, chat templates, keys and metrics.

Imports the engine's client, protocol and config, never torch or transformers.
"""

DISTRIBUTION = "gearserve"


def version() -> str:
    """The installed version; a plain checkout that was never installed says so."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version(DISTRIBUTION)
    except PackageNotFoundError:
        return "0+source"
