"""Hosts meet before JAX starts: all of them learn in one line what does not fit."""
import concurrent.futures
import socket
import threading

import pytest

from softmask_jax.distributed import rendezvous
from softmask_jax.distributed.rendezvous import Host, answer, differences

SAME = {"jax": "1.0", "config.train.steps": "8"}


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


def host(process, processes=2, prints=SAME):
    return Host(process, processes, f"node{process}", prints)


def meet(folder, *members, seconds=20.0, address=None, folders=None):
    """What each host's call says: None where all is well."""
    address = address or free_address()

    def one(i):
        try:
            where = folders[i] if folders else folder
            return answer(address, members[i], seconds=seconds, folder=where)
        except RuntimeError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(one, range(len(members))))


def test_hosts_that_fit_meet_and_leave_the_port_to_jax(tmp_path):
    address = free_address()
    assert meet(tmp_path, *(host(i, 4) for i in range(4)), address=address) == [None] * 4
    socket.create_server(("", rendezvous.split_address(address)[1])).close()


def test_all_learn_which_host_differs_and_in_what(tmp_path):
    odd = SAME | {"jax": "0.9"}
    said = meet(tmp_path, host(0, 3), host(1, 3), host(2, 3, odd))
    expected = "The hosts do not run the same: jax is 0.9 on host 2 (node2), 1.0 on host 0 and 1 more."
    assert said == [expected] * 3


def test_of_two_hosts_that_differ_the_second_is_named():
    said = differences({0: host(0), 1: host(1, prints=SAME | {"config.train.steps": "9"})})
    assert said == "The hosts do not run the same: config.train.steps is 9 on host 1 (node1), 8 on host 0."


def test_many_differences_are_counted():
    first, second = ({str(i): f"{i}{j}" for i in range(9)} for j in (0, 1))
    said = differences({0: host(0, prints=first), 1: host(1, prints=second)})
    assert said.endswith("3 is 31 on host 1 (node1), 30 on host 0; and 5 more.")


def test_counts_of_processes_that_differ_are_named(tmp_path):
    said = meet(tmp_path, host(0, 2), host(1, 3))
    assert said == ["Host 1 (node1) was told that there are 3 processes, host 0 (node0) that there are 2."] * 2


def test_two_processes_of_one_index_are_named(tmp_path):
    said = meet(tmp_path, host(0, 3), host(1, 3), host(1, 3))
    assert said == ["Two processes, on node1 and node1, say that they are host 1."] * 3


def test_a_host_that_does_not_come_is_named_to_those_who_did(tmp_path):
    said = meet(tmp_path, host(0, 3), host(2, 3), seconds=1.5)
    assert said[0] == said[1] and "Of 3 hosts 1 did not come to localhost:" in said[0]
    assert "within 1.5 s; there: 0 (node0), 2 (node2)." in said[0]


def test_a_first_host_that_does_not_answer_is_named(tmp_path):
    (said,) = meet(tmp_path, host(1), seconds=1)
    assert "Host 1: no answer from host 0 at localhost:" in said and "within 1 s (Connection refused)" in said


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("", 0)) as server:
        (said,) = meet(tmp_path, host(0), address=f"localhost:{server.getsockname()[1]}", seconds=1)
    assert "of this host, the coordinator's, cannot be used (Address already in use" in said


def test_something_else_that_listens_there_is_not_taken_for_a_run(tmp_path):
    with socket.create_server(("localhost", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(b"220 mail\n")
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        (said,) = meet(tmp_path, host(1), address=f"localhost:{server.getsockname()[1]}", seconds=1)
    assert "(what listens there is no run that starts)" in said


def test_strangers_are_sent_away_and_the_hosts_meet_nevertheless(tmp_path):
    address = free_address()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(answer, address, host(0), seconds=20, folder=tmp_path)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b""):
            while True:
                try:
                    with socket.create_connection(rendezvous.split_address(address), timeout=5) as stranger:
                        stranger.sendall(words)
                    break
                except ConnectionRefusedError:
                    pass
        answer(address, host(1), seconds=20, folder=tmp_path)
        assert first.result() is None


def test_a_folder_that_the_hosts_do_not_share_is_named(tmp_path):
    said = meet(tmp_path, host(0), host(1), folders=[tmp_path / "a", tmp_path / "b"])
    assert said[0] == said[1]
    assert said[0].startswith("Host 1 (node1) does not see what host 0 wrote in ") and "must share --workdir" in said[0]


@pytest.mark.parametrize("address", ["a", "a:", ":8", "a:x", "a:70000"])
def test_an_address_of_another_form_is_named(address):
    with pytest.raises(ValueError, match=f"'{address}' is not of the form HOST:PORT"):
        rendezvous.split_address(address)
