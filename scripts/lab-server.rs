//! What the tasks of the swarm lab run: a web server, an echo server and a datagram server in one static
//! binary, since there is no registry to have an image from. Built by `scripts/lab-swarm image`.
//!
//!     lab-server [PROTOCOL=PORT...]      http=80 unless something is said; also echo=7 (TCP lines), udp=5353
//!
//! HTTP paths: / (who answered, and to whom), /bytes/N (so many), /upload/* (PUT: how many came).
//! /health answers 200, or 503 while the file /sick is there.
//!
//! As the first process of its container it is not ended by SIGTERM, and so goes on serving what it has
//! until the grace period is over.

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    thread,
};

/// Small, because there are thousands of connections, each with its thread.
const STACK: usize = 64 << 10;

fn main() {
    let mut arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.is_empty() {
        arguments.push("http=80".to_owned());
    }
    let name = fs::read_to_string("/etc/hostname").expect("a container has a name");
    let name: &'static str = name.trim().to_owned().leak();
    let servers: Vec<_> = arguments.iter().map(|argument| start(argument, name)).collect();
    for server in servers {
        server.join().expect("a server does not end");
    }
}

fn start(argument: &str, name: &'static str) -> thread::JoinHandle<()> {
    let (protocol, port) = argument.split_once('=').expect("PROTOCOL=PORT");
    let address = ("0.0.0.0", port.parse().expect("a port is a number"));
    let serve: fn(TcpStream, &str) -> io::Result<()> = match protocol {
        "http" => http,
        "echo" => echo,
        "udp" => {
            let socket = UdpSocket::bind(address).expect("the port is free");
            return thread::spawn(move || datagrams(&socket, name));
        }
        _ => panic!("{protocol} is not http, echo or udp"),
    };
    let listener = TcpListener::bind(address).expect("the port is free");
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // What fails with one client is that client's.
            let work = move || drop(serve(client, name));
            drop(thread::Builder::new().stack_size(STACK).spawn(work));
        }
    })
}

/// What every answer begins with: who answers, and whom.
fn greeting(name: &str, client: SocketAddr) -> Vec<u8> {
    format!("{name} {} {} ", client.ip(), client.port()).into_bytes()
}

fn datagrams(socket: &UdpSocket, name: &str) {
    let mut bytes = [0; 65_535];
    while let Ok((length, client)) = socket.recv_from(&mut bytes) {
        let answer = [&greeting(name, client), &bytes[..length]].concat();
        // Who is gone gets no answer.
        let _ = socket.send_to(&answer, client);
    }
}

fn echo(mut client: TcpStream, name: &str) -> io::Result<()> {
    let greeting = greeting(name, client.peer_addr()?);
    let mut lines = BufReader::new(client.try_clone()?);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        client.write_all(&[&greeting[..], &line].concat())?;
        line.clear();
    }
    Ok(())
}

struct Request {
    path: String,
    /// Bytes of its body.
    length: u64,
    is_last: bool,
    wants_continue: bool,
}

/// `None` at the end of the connection.
fn request(reader: &mut impl BufRead) -> io::Result<Option<Request>> {
    let mut lines = reader.lines();
    let Some(first) = lines.next().transpose()? else { return Ok(None) };
    let path = first.split(' ').nth(1).unwrap_or("/").to_owned();
    let mut request = Request { path, length: 0, is_last: false, wants_continue: false };
    for line in lines {
        let line = line?.to_ascii_lowercase();
        match line.split_once(": ") {
            None => return Ok(Some(request)),
            Some(("content-length", value)) => request.length = value.parse().unwrap_or(0),
            Some(("expect", "100-continue")) => request.wants_continue = true,
            Some(("connection", "close")) => request.is_last = true,
            Some(_) => {}
        }
    }
    Ok(None)
}

fn http(mut client: TcpStream, name: &str) -> io::Result<()> {
    let address = client.peer_addr()?;
    client.set_nodelay(true)?;
    let mut reader = BufReader::new(client.try_clone()?);
    while let Some(request) = request(&mut reader)? {
        if request.wants_continue {
            client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let got = io::copy(&mut reader.by_ref().take(request.length), &mut io::sink())?;
        let path = &request.path;
        let is_sick = path == "/health" && Path::new("/sick").exists();
        let body = match path.strip_prefix("/bytes/") {
            Some(count) => vec![b'.'; count.parse().unwrap_or(0)],
            None if path.starts_with("/upload/") => format!("{got}\n").into_bytes(),
            None => format!(
                "backend={name} client={} port={} uri={path}\n",
                address.ip(),
                address.port()
            )
            .into_bytes(),
        };
        let head = format!(
            "HTTP/1.1 {}\r\nContent-Length: {}\r\nX-Backend: {name}\r\nConnection: {}\r\n\r\n",
            if is_sick { "503 Service Unavailable" } else { "200 OK" },
            body.len(),
            if request.is_last { "close" } else { "keep-alive" },
        );
        client.write_all(&[head.into_bytes(), body].concat())?;
        if request.is_last {
            break;
        }
    }
    Ok(())
}
