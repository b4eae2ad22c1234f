"""Grafana dashboards, Prometheus rules and alerts, and their generator from the metrics catalog."""
