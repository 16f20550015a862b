#!/usr/bin/python3
"""crpc with implementations of baidu_std that others wrote, fetched by their package managers. Needs
a network, so it is no part of `make test`.

    make interop

jprotobuf: Baidu's Java implementation, from Maven Central; needs mvn and a JDK. What cannot be
fetched is reported as skipped. The last line is "N passed, N failed".
"""
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BUILD = os.path.abspath(os.environ.get("BUILD", os.path.join(ROOT, "build")))
WORK = os.path.join(BUILD, "interop")
EXAMPLES = os.path.join(BUILD, "examples")

passed = failed = 0


def check(good, what):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print("FAIL %s" % what, flush=True)


def run(*command, seconds=60, **options):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
                              stdin=subprocess.DEVNULL, timeout=seconds, encoding="utf-8",
                              errors="replace", **options)
    except subprocess.TimeoutExpired as late:
        return subprocess.CompletedProcess(command, -1, "", "timed out after %g s" % late.timeout)


def first_line(process, seconds=30):
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline().decode() if ready else ""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port, seconds=10):
    """It says that it serves a little before it listens."""
    for _ in range(seconds * 10):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        except OSError:
            time.sleep(0.1)
    return False


def check_call(port, what, code, *words, options=()):
    """echo_client calls a peer: exit code, and words on either output."""
    done = run(os.path.join(EXAMPLES, "echo_client"), "tcp://127.0.0.1:%d" % port, what,
               "--timeout-ms", "5000", *options)
    check(done.returncode == code and all(w in done.stdout + done.stderr for w in words),
          "echo_client %.40r: exit %d, %.300s" % (what, done.returncode, done.stdout + done.stderr))


def jprotobuf_as_client(java):
    server = subprocess.Popen([os.path.join(EXAMPLES, "echo_server"), "tcp://127.0.0.1:0"],
                              stdout=subprocess.PIPE)
    try:
        port = first_line(server).rsplit(":", 1)[-1].strip()
        done = run(*java, "client", "127.0.0.1", port)
        print("jprotobuf calls echo_server: " + done.stdout, end="")
        check(done.returncode == 0 and " passed, 0 failed" in done.stdout,
              "jprotobuf's client: exit %d, %s" % (done.returncode, done.stderr[-600:]))
    finally:
        server.send_signal(signal.SIGTERM)
        check(server.wait(10) == 0, "echo_server ended with %s" % server.returncode)
        server.stdout.close()


def jprotobuf_with_a_credential(java):
    """jprotobuf sends the credential with each message."""
    server = subprocess.Popen([os.path.join(WORK, "guarded_server")], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    try:
        port = first_line(server).rsplit(":", 1)[-1].strip()
        done = run(*java, "guarded", "127.0.0.1", port)
        print("jprotobuf calls guarded_server: " + done.stdout, end="")
        check(done.returncode == 0 and " passed, 0 failed" in done.stdout,
              "jprotobuf with a credential: exit %d, %s" % (done.returncode, done.stderr[-600:]))
    finally:
        server.stdin.close()
        check(server.wait(10) == 0, "guarded_server ended with %s" % server.returncode)
        server.stdout.close()


def jprotobuf_as_server(java):
    port = free_port()
    server = subprocess.Popen([*java, "server", str(port)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        check(first_line(server).startswith("serving") and wait_for(port),
              "jprotobuf's server does not start")
        for text in ("hello", "x" * 128, "x" * 100000, "\u4f60\u597d"):
            check_call(port, text, 0, text)
        check_call(port, "hello", 0, "hello", options=("--log-id", "123456789012345"))
        check_call(port, "hello", 0, "hello", options=("--attachment", "ignored by its service"))
        check_call(port, "throw", 1, "(remote)", "127.0.0.1:%d" % port)
    finally:
        server.stdin.close()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()


def jprotobuf():
    if not all(map(shutil.which, ("mvn", "java", "javac"))):
        print("skipped: jprotobuf: mvn, java and javac are needed")
        return
    work = os.path.join(WORK, "jprotobuf")
    os.makedirs(work, exist_ok=True)
    source = os.path.join(HERE, "jprotobuf")
    classpath = os.path.join(work, "classpath")
    done = run("mvn", "-q", "-B", "dependency:build-classpath", "-Dmdep.outputFile=" + classpath,
               seconds=300, cwd=source)
    if done.returncode:
        print("skipped: jprotobuf cannot be fetched: %s" % (done.stdout + done.stderr)[-300:])
        return
    with open(classpath, encoding="utf-8") as file:
        jars = file.read().strip()
    done = run("javac", "-cp", jars, "-d", work, os.path.join(source, "Peer.java"))
    if done.returncode:
        check(False, "Peer.java does not compile: %s" % done.stderr)
        return
    java = ["java", "-Xmx256m", "-cp", jars + os.pathsep + work, "Peer"]
    jprotobuf_as_client(java)
    jprotobuf_with_a_credential(java)
    jprotobuf_as_server(java)


def main():
    for program in (os.path.join(EXAMPLES, "echo_server"), os.path.join(WORK, "guarded_server")):
        if not os.path.exists(program):
            sys.exit("run.py: there is no %s: `make interop` builds it" % program)
    jprotobuf()
    print("%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
