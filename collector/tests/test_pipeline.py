from services import *


def test_smoke(collector, broker, database):
    sent = publish(broker, [("iot/data", b"n:%d" % i) for i in range(1000)])
    assert len(sent) == 1000
    collector.wait_settled(1000)
    assert set(database.payloads()) == sent
