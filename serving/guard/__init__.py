"""Guards: what comes in, what is retrieved and what goes out, looked at before it goes on (configs/serve, `guard`).

    serving.guard.contract    what a guard is
    serving.guard.private     secrets and personal data: found by pipelines.private
    serving.guard.orders      texts that give the model orders: found by pipelines.rag.screen
    serving.guard.bounds      replies that go round in circles, or do not end
    serving.guard.reply       one reply, whole or streamed, on its way through the guards
    serving.guard.gate        all guards as configured: what the APIs call

Guards know plain forms and count what they find (llmlab_guard_decisions_total). They lower a risk and end none.
"""
