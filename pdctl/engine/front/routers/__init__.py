"""This engine behind routers of other projects: vllm-router in PD mode, and LMDeploy's `serve proxy` with DistServe.

They have no secret of this run, know no leases, and neither resume nor repeat a request. So hand-overs that they carry
are sealed or stay between the engines, and a decode engine does not depend on what they did to the prefill's request.
"""
