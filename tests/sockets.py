"""Which sockets a process listens on, and that this one may open many."""

import resource

import psutil


def listening(pid: int) -> set[tuple[str, int]]:
    """Address and port of every TCP socket that the process, or a thread of it, is bound to and waits on."""
    connections = psutil.Process(pid).net_connections("tcp")
    bound = (connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN)
    return {(address.removeprefix("::ffff:"), port) for address, port in bound}


def open_files(count: int) -> None:
    """Let this process open so many files, where the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
