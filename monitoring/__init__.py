"""What is made from the metrics catalog, and what makes it: Grafana dashboards, Prometheus rules and alerts."""
