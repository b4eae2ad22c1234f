"""Grafana's dashboards, each a list of rows of panels; `panel` turns them into Grafana's JSON."""

from monitoring.boards import cache, machine, media, overview, tiers
from monitoring.boards.panel import Dashboard

DASHBOARDS: tuple[Dashboard, ...] = (
    overview.DASHBOARD,
    cache.DASHBOARD,
    tiers.DASHBOARD,
    media.DASHBOARD,
    machine.DASHBOARD,
)
