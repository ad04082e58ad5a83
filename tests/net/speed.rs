//! How fast a log goes over the loopback device. Not part of a test run, since it only measures:
//! `cargo nextest run --release --run-ignored only --no-capture loopback`

use std::time::Instant;

use bytes::Bytes;

use super::pair;

const CHUNK_BYTES: usize = 1 << 20;
const CHUNKS: usize = 1024;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn loopback() {
    let mut rates = Vec::new();
    for _ in 0..5 {
        let (_listener, (near, _near_control), (far, _far_control)) = pair().await;
        let begun = Instant::now();
        let sending = tokio::spawn(async move {
            let mut log = near.open_log().await.unwrap();
            let chunk = Bytes::from(vec![7; CHUNK_BYTES]);
            for _ in 0..CHUNKS {
                log.write_chunk(chunk.clone()).await.unwrap();
            }
            log.finish().unwrap();
            near
        });
        let mut log = far.accept_log().await.unwrap();
        let mut length = 0;
        while let Some(chunk) = log.read_chunk(CHUNK_BYTES).await.unwrap() {
            length += chunk.len();
        }
        assert_eq!(length, CHUNKS * CHUNK_BYTES);
        let megabytes = f64::from(u32::try_from(length / 1000).unwrap()) / 1e3;
        rates.push(megabytes / begun.elapsed().as_secs_f64());
        let stats = sending.await.unwrap().stats();
        eprintln!("{:.0} MB/s, {stats:?}", rates[rates.len() - 1]);
    }
    rates.sort_by(f64::total_cmp);
    eprintln!("median {:.0} MB/s", rates[2]);
}
