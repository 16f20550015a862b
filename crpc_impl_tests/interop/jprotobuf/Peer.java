// The echo service with Baidu's Java implementation of baidu_std, jprotobuf-rpc-core.
//
//   Peer server PORT          serves until its standard input ends
//   Peer client HOST PORT     calls; prints `N passed, N failed`
//   Peer guarded HOST PORT    calls a server that wants a credential; prints the same

import com.baidu.bjf.remoting.protobuf.FieldType;
import com.baidu.bjf.remoting.protobuf.annotation.Protobuf;
import com.baidu.jprotobuf.pbrpc.AuthenticationDataHandler;
import com.baidu.jprotobuf.pbrpc.ProtobufRPC;
import com.baidu.jprotobuf.pbrpc.ProtobufRPCService;
import com.baidu.jprotobuf.pbrpc.client.ProtobufRpcProxy;
import com.baidu.jprotobuf.pbrpc.transport.RpcClient;
import com.baidu.jprotobuf.pbrpc.transport.RpcServer;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;

public class Peer {
    public static class Echo {
        @Protobuf(fieldType = FieldType.STRING, order = 1, required = true)
        public String message;
    }

    public interface Calls {
        @ProtobufRPC(serviceName = "example.EchoService", methodName = "Echo",
                     onceTalkTimeout = 5000)
        Echo echo(Echo request);

        @ProtobufRPC(serviceName = "EchoService", methodName = "Echo", onceTalkTimeout = 5000)
        Echo echoByShortName(Echo request);

        @ProtobufRPC(serviceName = "example.EchoService", methodName = "Nothing",
                     onceTalkTimeout = 5000)
        Echo noSuchMethod(Echo request);
    }

    public static class Right implements AuthenticationDataHandler {
        @Override
        public byte[] create(String service, String method, Object... parameters) {
            return "open sesame".getBytes();
        }
    }

    public static class Wrong implements AuthenticationDataHandler {
        @Override
        public byte[] create(String service, String method, Object... parameters) {
            return "open barley".getBytes();
        }
    }

    public interface Guarded {
        @ProtobufRPC(serviceName = "example.EchoService", methodName = "Echo",
                     onceTalkTimeout = 5000, authenticationDataHandler = Right.class)
        Echo right(Echo request);

        // A name can stand in one method only: this is the same one by its short name.
        @ProtobufRPC(serviceName = "EchoService", methodName = "Echo", onceTalkTimeout = 5000,
                     authenticationDataHandler = Wrong.class)
        Echo wrong(Echo request);
    }

    public static class Service {
        @ProtobufRPCService(serviceName = "example.EchoService", methodName = "Echo")
        public Echo echo(Echo request) {
            if (request.message.equals("throw")) {
                throw new IllegalStateException("asked to");
            }
            return request;
        }
    }

    static int passed;
    static int failed;

    static void check(boolean good, String what) {
        if (good) {
            passed++;
        } else {
            failed++;
            System.out.println("FAIL " + what);
        }
    }

    static Echo of(String text) {
        Echo echo = new Echo();
        echo.message = text;
        return echo;
    }

    static boolean returns(Calls calls, String text) {
        return calls.echo(of(text)).message.equals(text);
    }

    static void client(String host, int port) throws Exception {
        RpcClient client = new RpcClient();
        ProtobufRpcProxy<Calls> proxy = new ProtobufRpcProxy<Calls>(client, Calls.class);
        proxy.setHost(host);
        proxy.setPort(port);
        Calls calls = proxy.proxy();

        for (int size : new int[] {1, 100, 127, 128, 70000, 1 << 20}) {
            check(returns(calls, "x".repeat(size)), size + " characters");
        }
        check(returns(calls, "\u4f60\u597d, gr\u00fc\u00dfe"), "more than ASCII");
        check(calls.echoByShortName(of("short")).message.equals("short"), "short service name");
        try {
            calls.noSuchMethod(of("x"));
            check(false, "an unknown method answers");
        } catch (Throwable e) {
            check(causes(e).contains("no such method"), "an unknown method says: " + causes(e));
        }
        check(returns(calls, "still"), "after an error");

        ExecutorService threads = Executors.newFixedThreadPool(16);
        List<Future<Boolean>> results = new ArrayList<>();
        for (int i = 0; i < 2000; i++) {
            String text = "call " + i;
            results.add(threads.submit(() -> returns(calls, text)));
        }
        int good = 0;
        for (Future<Boolean> result : results) {
            good += result.get(20, TimeUnit.SECONDS) ? 1 : 0;
        }
        check(good == 2000, "of 2000 calls by 16 threads " + good + " are right");
        end();
    }

    static String causes(Throwable e) {
        String all = "";
        for (Throwable t = e; t != null; t = t.getCause()) {
            all += t + "; ";
        }
        return all;
    }

    static Guarded guardedCalls(String host, int port) {
        ProtobufRpcProxy<Guarded> proxy =
            new ProtobufRpcProxy<Guarded>(new RpcClient(), Guarded.class);
        proxy.setHost(host);
        proxy.setPort(port);
        return proxy.proxy();
    }

    // Each message brings the credential. The connection with a wrong one is closed, so that this
    // client is another one: jprotobuf's would use the closed connection once more.
    static void guarded(String host, int port) throws Exception {
        Guarded calls = guardedCalls(host, port);
        for (int i = 0; i < 20; i++) {
            check(calls.right(of("mine " + i)).message.equals("mine " + i), "the credential counts");
        }
        try {
            guardedCalls(host, port).wrong(of("x"));
            check(false, "a wrong credential answers");
        } catch (Throwable e) {
            check(causes(e).contains("1004"), "a wrong credential says: " + causes(e));
        }
        check(calls.right(of("still")).message.equals("still"), "another's refusal does not matter");
        end();
    }

    static void end() {
        System.out.println(passed + " passed, " + failed + " failed");
        System.out.flush();
        Runtime.getRuntime().halt(failed == 0 ? 0 : 1);
    }

    static void server(int port) throws Exception {
        RpcServer server = new RpcServer();
        server.registerService(new Service());
        server.start(port);
        System.out.println("serving on " + port);
        System.out.flush();
        while (System.in.read() >= 0) {
            continue;
        }
        Runtime.getRuntime().halt(0);
    }

    public static void main(String[] arguments) throws Exception {
        if (arguments[0].equals("server")) {
            server(Integer.parseInt(arguments[1]));
        } else if (arguments[0].equals("guarded")) {
            guarded(arguments[1], Integer.parseInt(arguments[2]));
        } else {
            client(arguments[1], Integer.parseInt(arguments[2]));
        }
    }
}
