"""The fault lab: classic faults in a stack of their own, which the learner finds on dashboards and in logs. `llmlab break`"""
