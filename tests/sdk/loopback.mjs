// Loaded before the tests of an npm client: it may talk to this machine alone, and trying more fails the run.

import net from "node:net";

const hosts = [undefined, "127.0.0.1", "localhost", "::1"];
const connect = net.Socket.prototype.connect;

net.Socket.prototype.connect = function (...given) {
  const options = Array.isArray(given[0]) ? given[0][0] : given[0];
  const host = typeof options === "object" ? options.host : given[1];
  if (typeof host !== "function" && !hosts.includes(host) && !options?.path) {
    console.error(`the client tried to talk to ${host}`);
    process.exitCode = 1;
    process.on("exit", () => (process.exitCode = 1));
    throw new Error(`the tests may not talk to ${host}`);
  }
  return connect.apply(this, given);
};
