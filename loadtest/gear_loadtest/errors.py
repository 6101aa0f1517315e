"""What stops a load test before it begins; failures of single requests are recorded, not raised.

LoadTestError
├── UsageError       the command line is at fault: exit status 2
└── ServerUnusable   the server cannot be tested as asked: exit status 1
"""


class LoadTestError(Exception):
    """One sentence that names the remedy."""

    exit_status = 1


class UsageError(LoadTestError):
    """Decided before anything is sent."""

    exit_status = 2


class ServerUnusable(LoadTestError):
    """Unreachable, the wrong path, a key refused, or no model to ask for."""
