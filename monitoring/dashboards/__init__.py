"""Five boards for Grafana, declared in Python from the declared metrics: overview, serving, rag, training, hardware.

`plots` is what a board is made of, `boards` lists them, `files` writes their JSON, `draw` draws them without Grafana. Run by:

    llmlab dashboards            # write monitoring/grafana/dashboards/*.json and the generated rules
    llmlab dashboards --check    # exit status 1 when a file on disk differs
    llmlab dashboards render overview -o overview.png
"""
