"""The hands of the lab: the command line, the demo, the doctor, the knowledge base."""
