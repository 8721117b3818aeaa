"""What watches a server: the Grafana dashboard, and alerts for the Prometheus Operator.

`python -m cluster.monitoring` writes both files anew, from `panels.py` and from
`cluster/docker/alerts.yaml`. `answers.py` and `picture/` draw the dashboard without Grafana.
"""
