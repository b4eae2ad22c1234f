"""Grafana's dashboards, each a list of rows of panels; `panel` turns them into Grafana's JSON."""

from edit_ray.metrics.dashboards import cache, machine, media, overview, tiers
from edit_ray.metrics.dashboards.panel import Dashboard

DASHBOARDS: tuple[Dashboard, ...] = (
    overview.DASHBOARD,
    cache.DASHBOARD,
    tiers.DASHBOARD,
    media.DASHBOARD,
    machine.DASHBOARD,
)
