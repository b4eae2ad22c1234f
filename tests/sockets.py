"""Which sockets a process listens on."""

import psutil


def listening(pid: int) -> set[tuple[str, int]]:
    """Address and port of every TCP socket that the process, or a thread of it, is bound to and waits on."""
    connections = psutil.Process(pid).net_connections("tcp")
    bound = (connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN)
    return {(address.removeprefix("::ffff:"), port) for address, port in bound}
